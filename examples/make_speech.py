"""Speaks the example recordings anew: python -m examples.make_speech (needs espeak-ng)."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import soundfile

from avatar.pocket.speech import Synthesiser, Utterance

HERE = Path(__file__).parent
WELCOME = (
    "Hello, and welcome! I am your digital host. Show me one picture and let me hear a voice, "
    "and I will speak for as long as you like. Maybe about the weather, maybe about blue umbrellas. Shall we begin?"
)
STORY = (
    "Once upon a time, above a small blue bay, there lived a baker named Papa Bruno. Every morning, before the bells, "
    "he put four warm loaves by the window. One foggy day, a fox came by. May I have some bread? asked the fox. "
    "Of course, said Bruno, but first you must whistle. The fox tried and tried. "
    "Then he opened his mouth, and out came the most beautiful song."
)
NI_HAO = "ni3 hao3! huan1 ying2 guang1 lin2. wo3 shi4 nin2 de5 shu4 zi4 zhu3 bo1, hen3 gao1 xing4 ren4 shi5 nin2."


def write_mp3(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libmp3lame", rate=sample_rate, layout="mono", bit_rate=48_000)
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = sample_rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def main() -> None:
    synthesiser = Synthesiser()
    welcome, _ = synthesiser.say(Utterance(WELCOME, "en-us+f3", speed=165, pitch=50))
    soundfile.write(HERE / "welcome.wav", welcome, synthesiser.sample_rate)
    story, _ = synthesiser.say(Utterance(STORY, "en-gb-x-rp", speed=165, pitch=40))
    write_mp3(HERE / "story.mp3", story, synthesiser.sample_rate)
    ni_hao, _ = synthesiser.say(Utterance(NI_HAO, "cmn-latn-pinyin+f2", speed=150))
    soundfile.write(HERE / "ni_hao.wav", ni_hao, synthesiser.sample_rate)


if __name__ == "__main__":
    main()

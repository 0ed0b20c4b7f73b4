"""In place of decord, which reads videos: lmms-eval's stock llava_hf imports it, and no task here has a video.

Its wheels cannot be verified after installing (their RECORD does not fit what they hold).
"""


def cpu(*_: object) -> None:
    raise NotImplementedError("no task has a video")


def VideoReader(*_: object, **__: object) -> None:
    raise NotImplementedError("no task has a video")

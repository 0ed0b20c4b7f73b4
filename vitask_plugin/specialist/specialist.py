"""A tuned checkpoint from Python: images in, probabilities of its labels out, as lmms-eval's `_score` tasks have them.

    from vitask_plugin import Specialist

    specialist = Specialist.load("out/mri/llava-lora-vitask", tsm="out/mri/tsm")
    for prediction in specialist.predict(["scan.png", "other.dcm"]):
        print(prediction.label, prediction.probabilities)

Shapes: B images of a batch, K classes.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from vitask_plugin.data.difference import difference
from vitask_plugin.data.images import say_once, truncated_refused
from vitask_plugin.data.picture_reader import PictureReader
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.asked_model import AskedModel
from vitask_plugin.evaluation.calibrated import Calibrations
from vitask_plugin.evaluation.decoding import Decoding, no_numbers
from vitask_plugin.evaluation.host_models import model_of
from vitask_plugin.evaluation.model_args import as_device, as_dtype
from vitask_plugin.files import check_folder
from vitask_plugin.inference import metrics
from vitask_plugin.inference.asking import Query
from vitask_plugin.method.connector import LEARNED
from vitask_plugin.model_folder import check_checkpoint
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.record.checkpoint import read_record
from vitask_plugin.specialist.calibrated import CalibratedQuestion
from vitask_plugin.specialist.prediction import Prediction
from vitask_plugin.specialist.question import Question, question_of
from vitask_plugin.tsm.device import memory_error_as
from vitask_plugin.tsm.model import TSM

logger = logging.getLogger(__name__)
Picture = str | Path | Image.Image | np.ndarray
EP = bool | Literal["average"]
ANSWER_TOKENS = 128  # as the tasks of lmms-eval that answer in words
_READERS = 4  # threads


class Specialist:
    """A checkpoint of any host, ready to be asked. Made by `load`.

    Attributes:
        classes: names, in the order of the probabilities. task: what is asked about.
        folder: of the checkpoint. has_exemplars: whether `ep=True` is possible.
    """

    def __init__(
        self,
        model: AskedModel,
        question: Question,
        reader: PictureReader,
        calibrations: CalibratedQuestion,
        folder: str,
    ) -> None:
        self._model, self._question, self._reader, self._calibrations = model, question, reader, calibrations
        self.folder = folder

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        task: str | None = None,
        tsm: str | Path | None = None,
        model_base: str | Path | None = None,
        device: str = "auto",
        calibrated: bool | None = None,
        labels: str | Path | None = None,
        connector: str | Path | None = None,
        dtype: str = "auto",
        window: tuple[float, float] | None = None,
        frame: int | None = None,
        trust_tsm_code: bool = False,
    ) -> "Specialist":
        """Loads a checkpoint of LLaVA 1.5 or a model in HF format, whole or LoRA, and the TSM beside it.

        Args:
            checkpoint: its folder. task: of those it was trained on; None = the only one.
            tsm: folder of the task-specific model, for exemplars. connector: of another TSM than that of training.
            model_base: of a LoRA checkpoint, the model it was trained from; by default the one that its adapter names.
            device: auto, cpu, cuda or cuda:N.
            calibrated: use the checkpoint's `calibration.json`; None = where it has one for the task.
            labels: a data set's folder or its labels.json, which says what to ask in place of the checkpoint's record.
            dtype: float32, bfloat16, float16, or auto: as the weights were saved.
            window: values (low, high) that become black and white in images of more than 8 bits; None = those that the
                training images went through, else what a DICOM file says. frame: page or frame of files that have
                several, from 0; None = that of training, else the first.
            trust_tsm_code: import the Python code that the TSM's tsm.json names, if it names any.

        Raises:
            VITaskError: naming what is absent, damaged, or does not fit.
        """
        folder = str(checkpoint)
        check_checkpoint(folder)
        for name, given in {"tsm": tsm, "model_base": model_base, "connector": connector}.items():
            if given is not None:
                check_folder(given, name)
        record = read_record(folder)
        question = question_of(record, folder, task, labels)
        model = model_of(folder)
        model.open(
            folder,
            None if model_base is None else str(model_base),
            tsm=None if tsm is None else str(tsm),
            connector=None if connector is None else str(connector),
            ep=tsm is not None or (record or {}).get("ep") == LEARNED,
            dtype=as_dtype(dtype, folder),
            device=as_device(None if device == "auto" else device, 0),
            trust_code=trust_tsm_code,
        )
        model.check_labels(f"--labels {str(labels)!r}", question.task, question.choices)
        reader = PictureReader.of(question.pixels)
        if window is not None:
            reader = replace(reader, window=Window(*window))
        if frame is not None:
            reader = replace(reader, frame=frame)
        known = Calibrations(folder, None if model.tsm is None else model.tsm.hash, connector)
        return cls(model, question, reader, CalibratedQuestion(known, question, calibrated), folder)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._question.choices

    @property
    def task(self) -> str:
        return self._question.task

    @property
    def has_exemplars(self) -> bool:
        block = {"task": self.task, "choices": self.classes}
        return self._model.prompting is not None and self._model.prompting.covers(block)

    @property
    def tsm(self) -> TSM | None:
        """The TSM beside the checkpoint, on its device."""
        return self._model.tsm

    def picture(self, image: Picture) -> Image.Image:
        """The RGB picture that the checkpoint sees of an image.

        Raises:
            VITaskError: it cannot be read.
        """
        picture = self._read(0, image)[1]
        if isinstance(picture, str):
            raise VITaskError(picture)
        return picture

    def predict(
        self, images: Iterable[Picture], *, ep: EP | None = None, answer: bool = False, batch_size: int = 8
    ) -> list[Prediction]:
        """What the checkpoint says of each image, in their order.

        Args:
            images: paths, PIL images or arrays [H, W] or [H, W, 3].
            ep: with exemplars, without, or "average": the mean of both vectors of probabilities; None = with them where
                a TSM is known. answer: in free text too. batch_size: images per forward.

        Raises:
            VITaskError: no exemplars for `ep`, no room in memory, or scores that are no numbers. An image that cannot
                be read is no such error but a prediction with one.
        """
        return list(self.stream(images, ep=ep, answer=answer, batch_size=batch_size))

    def stream(
        self, images: Iterable[Picture], *, ep: EP | None = None, answer: bool = False, batch_size: int = 8
    ) -> Iterator[Prediction]:
        """`predict`, batch by batch; the next images are read meanwhile."""
        way = self.way(ep)
        numbered = iter(enumerate(images))
        with truncated_refused(), ThreadPoolExecutor(_READERS) as pool:
            ahead: list[Any] = []
            while True:
                for number, image in islice(numbered, max(0, 2 * batch_size - len(ahead))):
                    ahead.append(pool.submit(self._read, number, image))
                if not ahead:
                    return
                batch, ahead = [one.result() for one in ahead[:batch_size]], ahead[batch_size:]
                yield from self._batch(batch, way, answer)

    def way(self, ep: EP | None) -> EP:
        """What `ep` means here.

        Raises:
            VITaskError: exemplars are asked for and there are none.
        """
        if ep is None:
            ep = self.tsm is not None
        if ep not in (True, False, "average"):
            raise VITaskError(f"ep={ep!r} is none of True, False and 'average'")
        if ep and not self.has_exemplars:
            other = f"task {self.task!r} with the labels {', '.join(self.classes)} is none of those it was trained on"
            why = (
                f"{other}; give ep=False (--ep false)"
                if self._model.prompting
                else "no TSM is given; give tsm, or ep=False"
            )
            raise VITaskError(f"checkpoint {self.folder!r} cannot be asked with exemplars, for {why}")
        return ep

    def describe(self, ep: EP | None = None) -> str:
        """What is asked, in one line."""
        way = self.way(ep)
        how = {True: "with exemplars", False: "without exemplars", "average": "with and without exemplars, averaged"}
        about = self._calibrations.line((False, True) if way == "average" else (way,))
        return f"task {self.task!r}, {len(self.classes)} classes, {how[way]}, {about}"

    # One batch ---------------------------------------------------------------------------------------------------

    def _read(self, number: int, image: Picture) -> tuple[str, Image.Image | str]:
        """Its name, and the RGB picture or why there is none."""
        name = str(image) if isinstance(image, str | Path) else f"image {number}"
        try:
            if isinstance(image, str | Path):
                return name, self._reader.read(Path(image))[0]
            return name, self._reader.see(image, str(number))
        except VITaskError as error:
            return name, str(error)

    def _batch(self, read: Sequence[tuple[str, Image.Image | str]], way: EP, answer: bool) -> list[Prediction]:
        seen = [(name, picture) for name, picture in read if not isinstance(picture, str)]
        said: list[Prediction] = []
        if seen:
            for name, picture in seen:
                self._compare(name, picture)
            said = self._asked([name for name, _ in seen], [picture for _, picture in seen], way, answer)
        whole = iter(said)
        return [Prediction.failed(name, one) if isinstance(one, str) else next(whole) for name, one in read]

    def _asked(self, names: Sequence[str], pictures: Sequence[Image.Image], way: EP, answer: bool) -> list[Prediction]:
        sentence = (
            f"out of memory on {self._model.device} with {len(names)} images in a batch; give a smaller batch size"
        )
        with memory_error_as(sentence), torch.no_grad():
            likely = self._probabilities(pictures, way)
            words = self._words(pictures, bool(way)) if answer else [None] * len(names)
        kind = self._question.kind
        return [
            Prediction.of(name, self.classes, own, kind, said)
            for name, own, said in zip(names, likely, words, strict=True)
        ]

    def _queries(self, pictures: Sequence[Image.Image], prompted: bool) -> list[Query]:
        return [Query(self._question.text, [picture], self.task, prompted) for picture in pictures]

    def _probabilities(self, pictures: Sequence[Image.Image], way: EP) -> np.ndarray:
        """[B, K]; of the average both questions are in one forward, which encodes each image once."""
        ways = (False, True) if way == "average" else (way,)
        queries = [query for prompted in ways for query in self._queries(pictures, prompted)]
        scores = self._model.score(queries, [self._question.answers] * len(queries))
        found = np.array([one.log_likelihoods.tolist() for one in scores])
        if not np.isfinite(found).all():
            raise no_numbers(Path(self.folder))
        calibrations = self._calibrations.of(ways)
        parts = zip(np.split(found, len(ways)), calibrations, strict=True)
        return np.mean([self._likely(part, calibration) for part, calibration in parts], axis=0)

    def _likely(self, scores: np.ndarray, calibration: Calibration | None) -> np.ndarray:
        if calibration is not None:
            return calibration.probabilities(scores)
        return np.array([metrics.probabilities((-row).tolist(), self._question.kind) for row in scores])

    def _words(self, pictures: Sequence[Image.Image], prompted: bool) -> list[str]:
        decoding = Decoding.of({}, ANSWER_TOKENS)
        found = self._model.answer(self._queries(pictures, prompted), decoding)
        return [decoding.cut(text) for text in self._model.tokenizer.batch_decode(found, skip_special_tokens=True)]

    def _compare(self, name: str, picture: Image.Image) -> None:
        """A word on the first image of another size than all of training."""
        sides = {"width": [picture.width] * 2, "height": [picture.height] * 2}
        trained = ((self._model.record or {}).get("images") or {}).get(self.task)
        found = trained and difference({side: trained[side] for side in sides}, sides)
        if found:
            say_once(
                f"image {name!r}: checkpoint {self.folder!r} was trained on {found.trained} of task {self.task!r}, and "
                f"this one is {picture.width}x{picture.height}; what it says of such images was not tried out",
                f"size {self.folder}",
            )

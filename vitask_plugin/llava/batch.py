"""What a VITask batch holds beyond upstream's: TSM features and negative images, in an order that makes them cheap."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from tqdm import tqdm

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.instructions import read_samples, tasks_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import inside, sha256_file
from vitask_plugin.llava.layout import branches_of, expanded_rows
from vitask_plugin.tsm.features import FeatureStore
from vitask_plugin.tsm.joint import Tasks
from vitask_plugin.tsm.predicted import predicted_answer

NO_INSTRUCTION = -1  # a sample without a `vitask` block: trained as upstream would, no exemplar, no negative


class VITaskDataset(LazySupervisedDataset):
    """Upstream's dataset, and for samples with a `vitask` block their exemplar and who can be whose negative.

    Attributes:
        features: attached by the trainer before the first batch; None where no TSM is used.
        instruction_ids: per sample, equal iff the questions are equal; `NO_INSTRUCTION` without a `vitask` block.
        response_ids: per sample, equal iff the answers are equal.

    Raises:
        VITaskError: the JSON is not LLaVA's, an image is missing or outside the image folder, or CRT is on and a task
            has a single answer (no image could be a negative).
    """

    def __init__(self, data_path: str, tokenizer: Any, data_args: Any, *, vitask: VITaskArguments) -> None:
        samples = read_samples(data_path)
        # Upstream's __init__ names its class in super(), and that name is ours in its module; this is all it does.
        self.list_data_dict, self.tokenizer, self.data_args = samples, tokenizer, data_args
        self.data_path = data_path
        self.features: FeatureStore | None = None
        self.kind = vitask.vitask_ep
        self.tasks = tasks_of(samples)
        self._tsm_tasks: Tasks = {}
        for sample in samples:
            if "image" in sample and not inside(data_args.image_folder, sample["image"]).is_file():
                raise VITaskError(
                    f"sample {sample.get('id')!r} of {data_path!r}: image {sample['image']!r} is not in "
                    f"the image folder {data_args.image_folder!r}; check --image_folder"
                )
        if not self.tasks:
            raise VITaskError(
                f"{data_path!r} has no sample with a 'vitask' block, so there is nothing to align or contrast; "
                "write it with `vitask data`, or train without --vitask"
            )
        self.instruction_ids, self.response_ids = _identities(samples)
        self._by_instruction: dict[int, list[int]] = {}
        for index, instruction in enumerate(self.instruction_ids):
            if instruction != NO_INSTRUCTION:
                self._by_instruction.setdefault(instruction, []).append(index)
        if vitask.uses_negatives:
            self._check_negatives(samples, data_path)
        self._contents: dict[str, str] = {}  # image -> SHA-256

    def _check_negatives(self, samples: list[dict], data_path: str) -> None:
        for members in self._by_instruction.values():
            if len({self.response_ids[index] for index in members}) < 2:
                first = samples[members[0]]
                raise VITaskError(
                    f"{data_path!r}: all {len(members)} samples that ask what sample {first.get('id')!r} (task "
                    f"{first['vitask']['task']!r}) asks have one answer, so CRT has no negative image; add samples "
                    "of another class, or set --vitask_crt_weight 0"
                )

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        item["index"] = index
        item["tsm_features"] = self._exemplar(index)
        return item

    def attach(self, features: FeatureStore, tsm_tasks: Tasks | None = None) -> None:
        """Takes the features, after a look at every image: each must be what its feature was extracted from.

        Args:
            tsm_tasks: of the TSM, by name; needed with `--vitask_ep text` alone.

        Raises:
            VITaskError: naming the first image that is unknown to the store or has changed, or a task that the TSM has
                other labels for.
        """
        self._tsm_tasks = tsm_tasks or {}
        if self.kind == "text":
            self._check_words()
        images = list(dict.fromkeys(sample["image"] for sample in self.list_data_dict if "vitask" in sample))
        for image in tqdm(images, "Images checked against their features", delay=5):
            self._contents[image] = sha256_file(inside(self.data_args.image_folder, image))
            features.get(image, self._contents[image])
        self.features = features

    def _check_words(self) -> None:
        for task, entry in self.tasks.items():
            known = self._tsm_tasks.get(task)
            if known != entry:
                found = known and known["choices"]
                raise VITaskError(
                    f"{self.data_path!r}: task {task!r} has the labels {entry['choices']!r}, the TSM's labels for it "
                    f"are {found!r}; --vitask_ep text needs a TSM that was trained on this task"
                )

    def _exemplar(self, index: int) -> torch.Tensor | None:
        """What a sample's exemplar is made of, None for a sample without a `vitask` block.

        [E, F] float32 TSM features; for `learned` [1, 0], nothing; for `text` [E] int64 token ids of the TSM's
        prediction.
        """
        sample = self.list_data_dict[index]
        if "vitask" not in sample or self.kind == "none":
            return None
        if self.kind == "learned":
            return torch.zeros(1, 0)
        image = sample["image"]
        if self.kind == "text":
            words = predicted_answer(self._tsm_tasks, self.features.logits(image), sample["vitask"]["task"])
            return torch.tensor(self.tokenizer(words, add_special_tokens=False).input_ids)
        return self.features.get(image, self._contents[image])

    def no_exemplar(self) -> torch.Tensor:
        """An exemplar of no tokens, of the kind that the others are."""
        if self.kind == "text":
            return torch.zeros(0, dtype=torch.int64)
        return torch.zeros(0, 0 if self.features is None else self.features.width)

    def draw_negative(self, index: int, draw: random.Random) -> int:
        """A random sample with the same instruction and another response; `_check_negatives` saw that one exists."""
        members = self._by_instruction[self.instruction_ids[index]]
        while True:
            other = draw.choice(members)
            if self.response_ids[other] != self.response_ids[index]:
                return other


def _identities(samples: list[dict]) -> tuple[list[int], list[int]]:
    instructions: dict[tuple[str, ...], int] = {}
    responses: dict[tuple[str, ...], int] = {}
    instruction_ids, response_ids = [], []
    for sample in samples:
        turns = sample["conversations"]
        question = tuple(turn["value"] for turn in turns if turn["from"] == "human")
        answer = tuple(turn["value"] for turn in turns if turn["from"] == "gpt")
        instruction_ids.append(
            instructions.setdefault(question, len(instructions)) if "vitask" in sample else NO_INSTRUCTION
        )
        response_ids.append(responses.setdefault(answer, len(responses)))
    return instruction_ids, response_ids


class VITaskCollator(DataCollatorForSupervisedDataset):
    """Upstream's batch plus `vitask`: TSM features, and the branches of the batch, laid out (see `layout`).

    For CRT a negative image is drawn at random among the batch's samples with the same instruction and a different
    response (those least used so far first, which keeps the packed rows even). Where the batch has none, it is drawn at
    random from the data set, and its image becomes an extra row unless a row holds it already. Draws depend on the seed
    and the samples of the batch alone, so they are the same whatever the number of workers, and after a resume.
    """

    def __init__(self, tokenizer: Any, *, vitask: VITaskArguments) -> None:
        super().__init__(tokenizer=tokenizer)
        self.vitask = vitask
        self.dataset: VITaskDataset | None = None
        self.seed = self.image_tokens = 0

    def attach(self, dataset: VITaskDataset, *, image_tokens: int, seed: int) -> None:
        """What the trainer knows and upstream's constructor is not told.

        Args:
            image_tokens: tokens that the vision tower makes of one image.
            seed: of the draws.
        """
        self.dataset, self.image_tokens, self.seed = dataset, image_tokens, seed

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        negatives, extra = [-1] * len(instances), []
        if self.vitask.uses_negatives:
            negatives, extra = self.negative_rows([instance["index"] for instance in instances])
        items = [*instances, *(self._prefix_row(instances[sample], image) for sample, image in extra)]
        batch = super().__call__([{key: item[key] for key in ("input_ids", "labels", "image")} for item in items])
        lengths, slots, features = [0] * len(instances), 0, {}
        if self.vitask.uses_exemplar:
            none = self.dataset.no_exemplar()
            found = [none if item["tsm_features"] is None else item["tsm_features"] for item in instances]
            lengths = [len(feature) for feature in found]
            # At least one slot, so that the connector runs on every rank.
            padded = pad_sequence([*found, none.new_zeros(1, *none.shape[1:])], batch_first=True)[:-1]
            slots, features = padded.shape[1], {"features": padded}
        limit = self.tokenizer.model_max_length
        rows, width = expanded_rows(
            batch["input_ids"], batch["attention_mask"], batch["labels"], image_tokens=self.image_tokens, limit=limit
        )
        branches = branches_of(
            rows,
            width,
            negatives,
            lengths,
            [int((item["labels"] != IGNORE_INDEX).sum()) for item in instances],
            slots=slots,
            replaces=self.vitask.vitask_ep == "replace",
            limit=limit,
            engine=self.vitask.vitask_engine,
        )
        branches.unanswered = [instances[sample]["index"] for sample in branches.unanswered]
        return {**batch, "vitask": {"branches": branches, **features}}

    def negative_rows(self, indices: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The row of each sample's negative (-1: it has none), and the extra rows as (sample, data set index)."""
        dataset, draw = self.dataset, random.Random(str((self.seed, indices)))
        rows, extra, used = [-1] * len(indices), [], [0] * len(indices)
        # Image -> a row that holds it behind the same prefix: upstream puts a task sample's image first in its turn.
        holding: dict[str, int] = {}
        for row, index in enumerate(indices):
            if dataset.instruction_ids[index] != NO_INSTRUCTION:
                holding.setdefault(dataset.list_data_dict[index]["image"], row)
        for sample in draw.sample(range(len(indices)), len(indices)):
            index = indices[sample]
            if dataset.instruction_ids[index] == NO_INSTRUCTION:
                continue
            eligible = [
                row
                for row, other in enumerate(indices)
                if dataset.instruction_ids[other] == dataset.instruction_ids[index]
                and dataset.response_ids[other] != dataset.response_ids[index]
            ]
            if eligible:
                least = min(used[row] for row in eligible)
                rows[sample] = draw.choice([row for row in eligible if used[row] == least])
                used[rows[sample]] += 1
            else:
                other = dataset.draw_negative(index, draw)
                new = len(indices) + len(extra)
                rows[sample] = holding.setdefault(dataset.list_data_dict[other]["image"], new)
                if rows[sample] == new:
                    extra.append((sample, other))
        return rows, extra

    def _prefix_row(self, instance: dict[str, Any], image: int) -> dict[str, Any]:
        """The sample's tokens up to its image, with another sample's image: a prefix for its negative branch."""
        last = int((instance["input_ids"] == IMAGE_TOKEN_INDEX).nonzero()[-1])
        prefix = instance["input_ids"][: last + 1]
        return {
            "input_ids": prefix,
            "labels": torch.full_like(prefix, IGNORE_INDEX),
            "image": self.dataset[image]["image"],
        }


class ContrastiveSampler(Sampler[int]):
    """Orders the data set so that a batch holds one instruction and at least two answers to it, where the data allow.

    Remainders of the groups and samples without a `vitask` block fill batches of their own; the only short batch is the
    last one. The order depends on the seed and the epoch alone, so all ranks agree on it.

    Args:
        batch_size: samples per device and forward.
        by_modality: fill those batches with image samples first, then with text-only ones, which are far shorter
            (upstream's --group_by_modality_length).
    """

    def __init__(self, dataset: VITaskDataset, batch_size: int, seed: int, *, by_modality: bool = False) -> None:
        self.instruction_ids = dataset.instruction_ids
        self.response_ids = dataset.response_ids
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.text_only = {i for i, sample in enumerate(dataset.list_data_dict) if "image" not in sample}
        self.by_modality = by_modality

    def __len__(self) -> int:
        return len(self.instruction_ids)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(str((self.seed, self.epoch)))
        groups: dict[int, list[int]] = {}
        for index, instruction in enumerate(self.instruction_ids):
            groups.setdefault(instruction, []).append(index)
        batches, rest = [], groups.pop(NO_INSTRUCTION, [])
        for members in groups.values():
            draw.shuffle(members)
            full = len(members) - len(members) % self.batch_size
            chunks = [members[start : start + self.batch_size] for start in range(0, full, self.batch_size)]
            self._mix(chunks)
            batches += chunks
            rest += members[full:]
        draw.shuffle(rest)
        if self.by_modality:
            rest.sort(key=self.text_only.__contains__)
        full = len(rest) - len(rest) % self.batch_size
        batches += [rest[start : start + self.batch_size] for start in range(0, full, self.batch_size)]
        draw.shuffle(batches)
        return iter([index for batch in [*batches, rest[full:]] for index in batch])

    def _mix(self, chunks: list[list[int]]) -> None:
        """Swaps a sample into every chunk of a single answer from a chunk that stays mixed without it."""
        single = [chunk for chunk in chunks if len(self._answers(chunk)) == 1]
        donors = [chunk for chunk in chunks if len(self._answers(chunk)) > 1]
        used_up: dict[int, int] = {}  # answer -> donors that have nothing left for it
        for chunk in single:
            answer = self.response_ids[chunk[0]]
            for donor in donors[used_up.setdefault(answer, 0) :]:
                place = self._spare(donor, answer)
                if place is not None:
                    chunk[0], donor[place] = donor[place], chunk[0]
                    break
                used_up[answer] += 1

    def _answers(self, chunk: list[int]) -> set[int]:
        return {self.response_ids[index] for index in chunk}

    def _spare(self, donor: list[int], answer: int) -> int | None:
        """A place in `donor` whose sample answers otherwise than `answer` and is not the only one to do so."""
        others = [place for place, index in enumerate(donor) if self.response_ids[index] != answer]
        return others[0] if len(others) > 1 else None

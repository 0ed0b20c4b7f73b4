"""Captions for `generalist.py`: what is learnt from them, in which stages, and what held-out ones cost.

B pictures of a batch, T image tokens, F width of the tower, D of the decoder.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vitask_plugin.hf import families
from vitask_plugin.method.branches import IGNORE

SAVE_EVERY = 25  # steps
SAY_EVERY = 20
WARM_UP = 0.05  # share of a stage's steps
QUESTIONS = (
    "Describe the image in one sentence.",
    "What is in the picture?",
    "Write a short caption for this image.",
    "Briefly say what you see.",
)


@dataclass(frozen=True)
class Stage:
    """`trains`: projector, lora (and the projector) or full (decoder and projector). `rate`: of the decoder, or of the
    projector where it is alone; beside the decoder it has the same."""

    name: str
    epochs: int
    trains: str
    rate: float


class Captioned:
    """Pictures by number with their captions, in the tokens of the model's own template.

    Args:
        features: [N, T, F] float16. captions: of each picture. train, held: numbers of pictures.
    """

    questions = QUESTIONS

    def __init__(
        self, processor: Any, features: Tensor, captions: list[list[str]], train: list[int], held: list[int]
    ) -> None:
        self.features, self.captions, self.train, self.held = features, captions, train, held
        self._tokenizer = processor.tokenizer
        self._prompts = []
        for question in self.questions:
            turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            image = processor.image_token
            text = text.replace(image, image * features.shape[1])
            self._prompts.append(self._tokenizer(text, add_special_tokens=False).input_ids)

    def tokens(self, number: int, caption: int, question: int) -> tuple[Tensor, Tensor]:
        """ids and labels [L] of a picture's caption; the answer and its end token are learnt."""
        prompt = self._prompts[question]
        text = " ".join(self.captions[number][caption].split()) + self._tokenizer.eos_token
        answer = self._tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor(prompt + answer), torch.tensor([IGNORE] * len(prompt) + answer)

    def batch(self, samples: Sequence[tuple[int, int, int]], seen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, L], labels [B, L], features [B, T, F] of (picture, caption, question); `seen`: whose features."""
        rows = [self.tokens(*sample) for sample in samples]
        ids = pad_sequence([one for one, _ in rows], batch_first=True, padding_value=self._tokenizer.pad_token_id)
        labels = pad_sequence([one for _, one in rows], batch_first=True, padding_value=IGNORE)
        return ids, labels, self.features[list(seen)].float()

    def epoch(self, size: int, seed: int, number: int) -> list[list[tuple[int, int, int]]]:
        """Batches of an epoch: every picture once, with one of its captions."""
        drawn = torch.Generator().manual_seed(seed * 1000 + number)
        order = torch.randperm(len(self.train), generator=drawn).tolist()
        words = torch.randint(2**20, (len(order), 2), generator=drawn).tolist()
        samples = [
            (self.train[one], word % len(self.captions[self.train[one]]), question % len(self.questions))
            for one, (word, question) in zip(order, words, strict=True)
        ]
        return [samples[first : first + size] for first in range(0, len(samples) - size + 1, size)]


class Aligner:
    """Trains `model` stage by stage; what a start has done is kept in `work`.

    Attributes:
        figures: of each stage, held-out losses in nats per token with the right picture and with another's.
    """

    def __init__(self, model: Any, data: Captioned, work: Path, *, batch: int, seed: int, rank: int) -> None:
        self.model, self.data, self.work = model, data, work
        self.batch, self.seed, self.rank = batch, seed, rank
        self.image_id = families.image_token(model.config, "the model")
        self.figures: dict[str, Any] = {"stages": []}
        _standardise(model, data)

    def run(self, stages: Sequence[Stage]) -> None:
        for number, stage in enumerate(stages):
            done, began = self.work / f"stage{number}.safetensors", time.monotonic()
            report = done.with_suffix(".json")
            if not report.is_file():
                figures = self._train(stage, number)
                save_file(self._weights(), done)
                figures["seconds"] = round(time.monotonic() - began, 1)
                report.write_text(json.dumps(figures))
            self.model.load_state_dict(load_file(done), strict=False)
            self.figures["stages"].append(json.loads(report.read_text()))

    def _weights(self) -> dict[str, Tensor]:
        """What alignment may change."""
        return {
            name: value.contiguous()
            for name, value in self.model.state_dict().items()
            if "vision_tower" not in name and "embed_tokens" not in name and "lm_head" not in name
        }

    def _train(self, stage: Stage, number: int) -> dict[str, Any]:
        model, adapted = self.model, None
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        if stage.trains == "full":
            model.model.language_model.layers.requires_grad_(True)
            model.model.language_model.norm.requires_grad_(True)
        elif stage.trains == "lora":
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(self.seed)
            how = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=families.lora_targets(model))
            adapted = get_peft_model(model, how)
            model.model.multi_modal_projector.requires_grad_(True)
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        optimizer = torch.optim.AdamW(list(trained.values()), lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01)
        per_epoch = len(self.data.epoch(self.batch, self.seed, 0))
        steps = per_epoch * stage.epochs
        step = self._resume(number, trained, optimizer)
        model.train()
        model.model.vision_tower.eval()
        shown, began = [], time.monotonic()
        while step < steps:
            epoch, place = divmod(step, per_epoch)
            if place == 0 or "batches" not in locals():
                batches = self.data.epoch(self.batch, self.seed, epoch)
            samples = batches[place]
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * _schedule(step, steps)
            loss = self._loss(*self.data.batch(samples, [one for one, *_ in samples]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimizer.step()
            shown.append(float(loss.detach()))
            step += 1
            if step % SAY_EVERY == 0:
                speed = (time.monotonic() - began) / len(shown)
                mean = sum(shown[-SAY_EVERY:]) / len(shown[-SAY_EVERY:])
                print(f"{stage.name} {step}/{steps} loss {mean:.3f} {speed:.2f} s/step", flush=True)
            if step % SAVE_EVERY == 0 or step == steps:
                self._save(number, trained, optimizer, step)
        if adapted is not None:
            self.model = adapted.merge_and_unload()
        figures = {"name": stage.name, "steps": steps, "rate": stage.rate, **self.judged()}
        print(figures, flush=True)
        return figures

    def _loss(self, ids: Tensor, labels: Tensor, features: Tensor, *, mean: bool = True) -> Tensor:
        """Nats per token [] of the answers; `mean=False`: sums per row [B, 2], nats and tokens."""
        model = self.model.model
        with torch.autocast("cpu", torch.bfloat16):
            embeds = model.language_model.embed_tokens(ids)
            image = model.multi_modal_projector(features).to(embeds.dtype)
            embeds = embeds.masked_scatter((ids == self.image_id)[..., None].expand_as(embeds), image)
            states = model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            wanted = labels[:, 1:] != IGNORE  # pads are on the right: no causal row looks at them
            logits = self.model.lm_head(states[:, :-1][wanted])
        losses = nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="none")
        if mean:
            return losses.mean()
        rows = wanted.nonzero()[:, 0]
        sums = torch.zeros(len(ids)).index_add(0, rows, losses)
        return torch.stack([sums, wanted.sum(1).float()], dim=1)

    @torch.no_grad()
    def judged(self) -> dict[str, float]:
        """What held-out captions cost, nats per token, with the right picture and with the next one's."""
        self.model.eval()
        held, sums = self.data.held, {0: torch.zeros(2), 1: torch.zeros(2)}
        nearer = 0
        for first in range(0, len(held), self.batch):
            numbers = held[first : first + self.batch]
            found = {}
            for shift in sums:
                seen = [held[(place + shift) % len(held)] for place in range(first, first + len(numbers))]
                found[shift] = self._loss(*self.data.batch([(one, 0, 0) for one in numbers], seen), mean=False)
                sums[shift] += found[shift].sum(0)
            nearer += int((found[0][:, 0] < found[1][:, 0]).sum())
        right, other = (float(total[0] / total[1]) for total in sums.values())
        return {
            "caption_loss": round(right, 4),
            "with_another_picture": round(other, 4),
            "right_picture_likelier": round(nearer / len(held), 4),
        }

    # What is kept --------------------------------------------------------------------------------------------------

    def _save(self, number: int, trained: dict[str, nn.Parameter], optimizer: Any, step: int) -> None:
        file = self.work / f"part{number}.pt"
        weights = {name: one.detach() for name, one in trained.items()}
        torch.save({"step": step, "weights": weights, "optimizer": optimizer.state_dict()}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)

    def _resume(self, number: int, trained: dict[str, nn.Parameter], optimizer: Any) -> int:
        file = self.work / f"part{number}.pt"
        if not file.is_file():
            return 0
        kept = torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, one in trained.items():
                one.copy_(kept["weights"][name])
        optimizer.load_state_dict(kept["optimizer"])
        return kept["step"]


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, int(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def _standardise(model: Any, data: Captioned) -> None:
    """The projector starts where each of its inputs has mean 0 and deviation 1, and its outputs the size of words.

    The tower's features come before its last normalisation: a few are a hundred times larger than the others.
    """
    some = data.features[data.train[:256]].float().flatten(0, 1)
    mean, deviation = some.mean(0), some.std(0).clamp(min=1e-4)
    projector = model.model.multi_modal_projector
    first, last = projector.linear_1, projector.linear_2
    first.weight.normal_(std=first.in_features**-0.5)
    last.weight.normal_(std=last.in_features**-0.5)
    first.weight.div_(deviation)
    first.bias.copy_(-first.weight @ mean)
    last.bias.zero_()
    words = model.get_input_embeddings().weight
    last.weight.mul_(words.std() / projector(some[:4096]).std())

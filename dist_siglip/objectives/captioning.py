"""Captioning: a decoder that writes captions and boxes from patch tokens, beside the loss."""

from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.models import BuiltModel, TokenShape
from dist_siglip.objectives.decoder import CaptionDecoder, CaptionWriting
from dist_siglip.objectives.objective import Objective, Rows, Term, uniform
from dist_siglip.objectives.token_loss import token_losses

Task = Literal["caption", "referring", "grounded"]

_PARALLEL_STREAM = 0  # of ``uniform``
_START_ID = 0  # of a caption
_SIDES = 4  # of a box
MOST_BINS = 65_536


class Captioning(Objective):
    """Cross-entropy of captions, and of boxes, written by a decoder that sees the patches.

        L = 1/N sum_i ( sum_l w_il CE(z_il, y_il) / sum_l w_il )        for each task, added up

    with w_il = 1 from the first token of a text to its end and on every side of a box, and else 0.
    The decoder has width, heads and MLP of the text tower and half of its layers, with attention to
    the patches in each; inputs are shifted right behind the id that stands for the task; positions
    are learned; the output matrix is its own and starts at 0, so that the first loss is log V. No
    attention leaves out padding of texts; patches that are padding (NaFlex) are not seen.

    The tasks are "caption"; "referring" (a text, then its box); "grounded" (a box, then its text).
    Every picture gets all of them, in one pass of the tower. Where it has no region only its
    caption counts. A box is four ids of the decoder's own beside those of the tokenizer, of its
    top, left, bottom and right in ``box_bins`` equal parts of the image, and stands behind, or
    before, a row of the tokenizer as it is.

    A share of the captions is predicted in parallel: all inputs are one mask id, and every position
    sees all. An evaluation writes from left to right, and measures how much of the loss the picture
    takes away: the loss with the patches of another picture, less the loss.

    Args:
        weight: as ``Objective``; of each task.
        start: as ``Objective``.
        ramp_steps: as ``Objective``.
        parallel: share of the captions predicted in parallel, in [0, 1].
        layers: of the decoder; null is half of those of the text tower, rounded up.
        width: channels of the decoder; null is that of the text tower.
        heads: of its attention; null is those of the text tower.
        tasks: "caption" and, with ``data.regions``, "referring" and "grounded".
        box_bins: parts of a side of the image that a box is told in.

    Raises:
        UserError: if a number is out of range; later, if tower or tokenizer do not fit, or batches
            have no regions.

    Source:
        Decoder and loss: Tschannen et al. 2023 (CapPa), arXiv:2306.07915, and its public code.
        Regions: Wan et al. 2024 (LocCa), arXiv:2403.19596, which writes prefixes and numbers as
        text. Sizes, place beside the sigmoid loss, share in parallel: Tschannen et al. 2025
        (SigLIP 2), arXiv:2502.14786, sections 2.1 and 2.2. Equal shares of the tasks, and the
        standard deviation .02 of the embeddings, are ours.
    """

    name: ClassVar[str] = "captioning"
    takes_padding: ClassVar[bool] = True
    decoder: CaptionDecoder
    output: nn.Linear
    writing: CaptionWriting
    num_words: int

    def __init__(
        self,
        weight: float = 1.0,
        start: float = 0.0,
        ramp_steps: int = 0,
        parallel: float = 0.5,
        layers: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        tasks: tuple[Task, ...] = ("caption",),
        box_bins: int = 500,
    ) -> None:
        super().__init__(weight, start, ramp_steps)
        if not 0 <= parallel <= 1:
            raise UserError(f"parallel ({parallel}) of Captioning must be in [0, 1]")
        for name, value in (("layers", layers), ("width", width), ("heads", heads)):
            if value is not None and value < 1:
                raise UserError(f"{name} ({value}) of Captioning must be at least 1")
        known = get_args(Task)
        if "caption" not in tasks or len({*tasks} & {*known}) != len(tasks):
            raise UserError(
                f"tasks ({list(tasks)}) of Captioning must be caption and, if you like, referring "
                "and grounded, each once"
            )
        if not 2 <= box_bins <= MOST_BINS:
            raise UserError(f"box_bins ({box_bins}) of Captioning must be 2 to {MOST_BINS}")
        self.tasks = tuple(task for task in known if task in tasks)
        self.needs = frozenset({"image tokens", "captions"})
        if len(tasks) > 1:
            self.needs |= {"regions"}
        self.parallel, self.box_bins = parallel, box_bins
        self._sizes = {"layers": layers, "width": width, "heads": heads}

    def build(self, built: BuiltModel, image: TokenShape) -> None:
        """Make decoder and output matrix for a text tower and its tokenizer.

        Raises:
            UserError: if ``width`` is no multiple of ``heads``, or captions are padded on the left.
        """
        tower = _text_sizes(built)
        asked = {name: value for name, value in self._sizes.items() if value is not None}
        sizes = {**tower, "layers": (tower["layers"] + 1) // 2, **asked}
        width, heads = sizes["width"], sizes["heads"]
        if width % heads:
            raise UserError(f"width ({width}) of Captioning must be a multiple of heads ({heads})")
        self.writing = CaptionWriting.of(built.tokenizer)
        self.num_words = sizes["vocab_size"]
        has_boxes = len(self.tasks) > 1
        num_ids = self.num_words + has_boxes * self.box_bins
        self.decoder = CaptionDecoder(
            vocab_size=num_ids,
            num_starts=has_boxes * (len(get_args(Task)) - 1),
            length=built.context_length + has_boxes * _SIDES,
            width=width,
            heads=heads,
            layers=sizes["layers"],
            mlp_width=width * tower["mlp_width"] // tower["width"],
            token_width=image.width,
        )
        self.output = nn.Linear(width, num_ids)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, rows: Rows) -> dict[str, Term]:
        """Return the loss of each task, in nats per token, summed over the rows that have it.

        ``caption_loss``, ``referring_loss``, ``grounded_loss``.
        """
        is_parallel = uniform(rows.draws, _PARALLEL_STREAM) < self.parallel
        asked = self._asked(rows)
        losses = self._losses(asked, rows.tokens, is_parallel, rows.token_mask)
        return {f"{task}_loss": _term(losses[task][0], each) for task, each in asked.items()}

    def measure(self, rows: Rows) -> dict[str, Term]:
        """Measure the captions and boxes of some rows, written from left to right.

        Returns:
            Of each task its ``_loss``; its ``_token_accuracy``, share of tokens that are the
            likeliest; its ``_picture_gain``, loss with the patches of the row before, less the
            loss. Of boxes that are written behind their text: ``box_exact``, share with all four
            ids right, and ``box_iou_50``, share that overlap theirs by half of what both cover.
        """
        asked = self._asked(rows)
        mask = rows.token_mask
        found = self._losses(asked, rows.tokens, None, mask)
        other_mask = None if mask is None else mask.roll(1, 0)
        others = self._losses(asked, rows.tokens.roll(1, 0), None, other_mask)
        terms: dict[str, Term] = {}
        for task, each in asked.items():
            losses, best = found[task]
            terms[f"{task}_loss"] = _term(losses, each)
            terms[f"{task}_token_accuracy"] = _term((best == each.ids).to(losses), each)
            gain = _term(others[task][0] - losses, each)
            # One row has no other.
            number = gain.number if len(rows.texts) > 1 else torch.zeros_like(gain.number)
            terms[f"{task}_picture_gain"] = Term(gain.total, number)
        if "referring" in asked and rows.regions is not None:
            counts = asked["referring"].counts
            bins = self.write_boxes(rows.tokens, rows.regions.texts, mask)
            is_exact = (bins == box_bins_of(rows.regions.boxes, self.box_bins)).all(dim=1)
            overlap = box_overlap(boxes_of(bins, self.box_bins), rows.regions.boxes)
            for name, hits in (("box_exact", is_exact), ("box_iou_50", overlap >= 0.5)):
                terms[name] = Term((hits & counts).sum(), counts.sum())
        return terms

    def write(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Write captions greedily, token by token.

        Args:
            tokens: (b, T, C) patches.
            token_mask: as ``Rows.token_mask``.

        Returns:
            (b, L) token ids, which begin as the tokenizer's rows do; what stands behind the end of
            a caption has no meaning. The decoder is computed once for each position, whatever it
            writes, so that sharded ranks stay together.
        """
        length = len(self.decoder.positions) - (_SIDES if len(self.tasks) > 1 else 0)
        texts = torch.full(
            (len(tokens), length), self.writing.pad_id, dtype=torch.long, device=tokens.device
        )
        prefix = self.writing.prefix
        texts[:, : len(prefix)] = torch.tensor(prefix, device=tokens.device)
        for place in range(len(prefix), length):
            hidden = self.decoder([texts], [_START_ID], tokens, None, token_mask)[:, place]
            texts[:, place] = self.output(hidden)[:, : self.num_words].argmax(dim=1)
        return texts

    def write_boxes(
        self, tokens: Tensor, texts: Tensor, token_mask: Tensor | None = None
    ) -> Tensor:
        """Write the box of a text greedily, side by side.

        Args:
            tokens: (b, T, C) patches.
            texts: (b, L) token ids of what to find in each picture.
            token_mask: as ``Rows.token_mask``.

        Returns:
            (b, 4) int64 in [0, box_bins): top, left, bottom, right.
        """
        ids = F.pad(texts, (0, _SIDES), value=self.num_words)
        for place in range(texts.shape[1], ids.shape[1]):
            starts = [self._start_of("referring")]
            hidden = self.decoder([ids], starts, tokens, None, token_mask)[:, place]
            ids[:, place] = self.num_words + self.output(hidden)[:, self.num_words :].argmax(dim=1)
        return ids[:, -_SIDES:] - self.num_words

    def compile_heads(self, backend: str) -> None:
        """Let ``torch.compile`` translate the decoder, without its output matrix."""
        self.decoder.compile(backend=backend)

    def _start_of(self, task: Task) -> int:
        """The id that a row of a task begins behind; ids above that of the mask are free."""
        place = get_args(Task).index(task)
        return _START_ID if place == 0 else self.decoder.mask_id + place

    def _asked(self, rows: Rows) -> dict[Task, "_Written"]:
        """What is to be written of some rows, by task."""
        captions = _Written(rows.texts, self.writing.is_target(rows.texts), rows.valid)
        if len(self.tasks) == 1:
            return {"caption": captions}
        if rows.regions is None:
            raise UserError(
                f"tasks ({list(self.tasks)}) of Captioning need batches with regions; set "
                "data.regions.json_field, or leave caption alone"
            )
        texts = rows.regions.texts
        sides = self.num_words + box_bins_of(rows.regions.boxes, self.box_bins)
        is_text = self.writing.is_target(texts)
        is_side = torch.ones_like(sides, dtype=torch.bool)
        counts = rows.valid & rows.regions.exist
        every: dict[Task, _Written] = {
            "caption": captions,
            "referring": _Written(
                torch.cat([texts, sides], dim=1), torch.cat([is_text, is_side], dim=1), counts
            ),
            "grounded": _Written(
                torch.cat([sides, texts], dim=1), torch.cat([is_side, is_text], dim=1), counts
            ),
        }
        return {task: every[task] for task in self.tasks}

    def _losses(
        self,
        asked: dict[Task, "_Written"],
        tokens: Tensor,
        is_parallel: Tensor | None,
        token_mask: Tensor | None,
    ) -> dict[Task, tuple[Tensor, Tensor]]:
        """(b, L) losses and likeliest ids of each task, in one pass of the decoder."""
        rows = [each.ids for each in asked.values()]
        starts = [self._start_of(task) for task in asked]
        hidden = self.decoder(rows, starts, tokens, is_parallel, token_mask).flatten(0, 1)
        labels = torch.cat(rows, dim=1)
        found = token_losses(hidden, self.output.weight, self.output.bias, labels.flatten())
        lengths = [ids.shape[1] for ids in rows]
        losses, best = (each.unflatten(0, labels.shape).split(lengths, dim=1) for each in found)
        return dict(zip(asked, zip(losses, best, strict=True), strict=True))


class _Written(NamedTuple):
    """Rows of a task: (b, L) ids, which of them are to be written, (b,) rows that count."""

    ids: Tensor
    is_target: Tensor
    counts: Tensor


def _term(values: Tensor, written: _Written) -> Term:
    """Sum, over rows, the mean of (b, L) values over what is to be written."""
    num_targets = written.is_target.sum(dim=1)
    counts = written.counts & (num_targets > 0)
    means = (values * written.is_target).sum(dim=1) / num_targets.clamp(min=1)
    return Term((means * counts).sum(), counts.sum())


def box_bins_of(boxes: Tensor, num_bins: int) -> Tensor:
    """Return which of equal parts of [0, 1] each side of (b, 4) boxes lies in, int64.

    Example:
        >>> box_bins_of(torch.tensor([[0.0, 0.24, 0.25, 1.0]]), 4)
        tensor([[0, 0, 1, 3]])
    """
    return (boxes * num_bins).long().clamp(0, num_bins - 1)


def boxes_of(bins: Tensor, num_bins: int) -> Tensor:
    """Return boxes whose sides lie in the middle of their parts, (b, 4) float32.

    Example:
        >>> boxes_of(torch.tensor([[0, 0, 1, 3]]), 4)
        tensor([[0.1250, 0.1250, 0.3750, 0.8750]])
    """
    return (bins.to(torch.float32) + 0.5) / num_bins


def box_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Return what two boxes share of what both cover, (b,) in [0, 1]; 0 of a box without area.

    Args:
        boxes: (b, 4), top, left, bottom, right.
        others: (b, 4).

    Example:
        >>> box_overlap(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.0, 0, 0.5, 1]]))
        tensor([0.5000])
    """
    start, stop = (
        torch.maximum(boxes[:, :2], others[:, :2]),
        torch.minimum(boxes[:, 2:], others[:, 2:]),
    )
    shared, *areas = (
        (side[:, 0].clamp(min=0) * side[:, 1].clamp(min=0))
        for side in (stop - start, boxes[:, 2:] - boxes[:, :2], others[:, 2:] - others[:, :2])
    )
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-12)


def _text_sizes(built: BuiltModel) -> dict[str, int]:
    """Width, heads, layers, MLP and vocabulary of a text tower."""
    text: Any = getattr(built.encoder.clip, "text", None)
    if isinstance(text, HFTextEncoder):
        names = arch_dict[text.config.model_type]["config_names"]
        sizes = ("width", "heads", "layers", "vocab_size")
        found = {size: int(getattr(text.config, names[size])) for size in sizes}
        inner = getattr(text.config, "intermediate_size", getattr(text.config, "d_ff", None))
        return {**found, "mlp_width": int(inner or 4 * found["width"])}
    config = CLIPTextCfg(**built.architecture["text_cfg"])
    return {
        "width": config.width,
        "heads": config.heads,
        "layers": config.layers,
        "vocab_size": config.vocab_size,
        "mlp_width": int(config.width * config.mlp_ratio),
    }

"""Pictures that are numbers, a model that reads them exactly, and a small SIMAT folder."""

import csv
import math
from dataclasses import replace

import torch
from PIL import Image

from dist_siglip.data.handwriting import number_from_words, number_in_words
from dist_siglip.evaluation import EvaluatedModel
from tests.support.shards import encode, tiny_inputs, write_shard

LENGTH = 64


def tokenize(texts):
    codes = [[ord(letter) for letter in text] for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in codes])


def one_hot(digits):
    """Ten coordinates a place, last place first; unit length."""
    row = torch.zeros(40)
    for place, digit in enumerate(reversed(digits)):
        row[10 * place + digit] = 1
    return row / math.sqrt(len(digits))


def picture_of(number):
    """Red and green are the number in base 100."""
    return Image.new("RGB", (16, 16), (number // 100, number % 100, 0))


def read_text(tokens):
    text = "".join(chr(code) for code in tokens.tolist() if code)
    return [int(digit) for digit in str(number_from_words(text))]


def number_model(read=read_text):
    """Exact one-hot features of the digits; ``read`` says what a text is taken for."""

    def encode_image(pixels):
        colors = pixels.float().mean(dim=(2, 3)).round().long()
        numbers = (100 * colors[:, 0] + colors[:, 1]).tolist()
        return torch.stack([one_hot([int(digit) for digit in str(n)]) for n in numbers])

    def encode_text(rows):
        return torch.stack([one_hot(read(row)) for row in rows])

    inputs = replace(tiny_inputs(), context_length=LENGTH, tokenizer=tokenize)
    device = torch.device("cpu")
    return EvaluatedModel(encode_image, encode_text, tokenize, inputs, 10.0, -5.0, device)


def write_numbers(folder, numbers):
    """One shard of pictures of numbers and their names."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        (
            f"{i:04d}",
            {
                "png": encode(picture_of(number)),
                "txt": number_in_words(number, len(str(number))).encode(),
            },
        )
        for i, number in enumerate(numbers)
    ]
    return str(write_shard(folder / "numbers.tar", samples))


WORDS = ("cat", "dog", "cow", "bear")


def simat_queries(num_pictures):
    """(picture, source, target, triplet, norm2, is_test) in a fixed disorder."""
    return [
        (
            (5 * i) % num_pictures,
            WORDS[i % 4],
            WORDS[(i + 1 + i % 3) % 4],
            (3 * i) % 6,
            1 + 7 * i % 40,
            i % 4 == 0,
        )
        for i in range(40)
    ]


def write_simat(folder, num_pictures=11):
    """A folder as SIMAT has it; returns the judgements."""
    images = folder / "images"
    order = torch.randperm(num_pictures, generator=torch.Generator().manual_seed(4)).tolist()
    regions = [100 + 7 * position for position in range(num_pictures)]
    for position, region in enumerate(regions):
        sub = images / f"A thing {position % 3}"
        sub.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(position)
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(sub / f"{region}.jpg")
    _write_csv(
        folder / "triplets.csv",
        ("region_id", "subj", "rel", "obj", "dataset_id"),
        [(regions[position], "a", "b", "c", position) for position in order],
    )
    _write_csv(
        folder / "transfos.csv",
        ("", "region_id", "value", "target", "target_ids", "norm2", "is_test"),
        [
            (i, regions[picture], source, target, triplet, norm2, is_test)
            for i, (picture, source, target, triplet, norm2, is_test) in enumerate(
                simat_queries(num_pictures)
            )
        ],
    )
    judgements = torch.rand(num_pictures, 6, generator=torch.Generator().manual_seed(9))
    torch.save(judgements, folder / "oscar_similarity_matrix.pt")
    return judgements


def _write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])

"""The networks that judge: CLIP (Radford et al. 2021), and the vision transformer that DINO trained (Caron et
al. 2021). Read from folders of transformers, whatever their size; attribute names are those of its CLIPModel.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from ldm.weights.arrays import Arrays, ArraysInMemory
from ldm.weights.checkpoint import fill
from ldm.weights.source import read_file

HEAD = 64  # channels of an attention head, in every published size of both
CLIP_NAMES = ("model.safetensors", "pytorch_model.bin")
# of transformers' ViT, of before version 5 and since, and of DINO's own file: in CLIP's words
DINO_NAMES = (
    (r"^(vit|module|backbone)\.", ""),
    (r"^embeddings\.cls_token$|^cls_token$", "embeddings.class_embedding"),
    (r"^embeddings\.position_embeddings$|^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^embeddings\.patch_embeddings\.projection|^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^encoder\.layer\.|^layers\.|^blocks\.", "encoder.layers."),
    (r"\.layernorm_before\.|\.norm1\.", ".layer_norm1."),
    (r"\.layernorm_after\.|\.norm2\.", ".layer_norm2."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".self_attn.\1_proj."),
    (r"\.attention\.(q|k|v)_proj\.", r".self_attn.\1_proj."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.|\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.|^norm\.", "post_layernorm."),
)
UNUSED = re.compile(r".*\.position_ids|logit_scale|pooler\.dense\..*|embeddings\.mask_token|head\..*")


@dataclass(frozen=True)
class Shape:
    """Of a transformer: what its weights say, and what only its configuration does."""

    width: int
    layers: int
    heads: int
    mlp: int
    eps: float
    is_quick: bool = False


class Attention(nn.Cell):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.size = shape.heads, shape.width // shape.heads
        self.q_proj, self.k_proj = nn.Dense(shape.width, shape.width), nn.Dense(shape.width, shape.width)
        self.v_proj, self.out_proj = nn.Dense(shape.width, shape.width), nn.Dense(shape.width, shape.width)

    def split(self, x):
        return x.reshape(x.shape[0], x.shape[1], self.heads, self.size).transpose(0, 2, 1, 3)

    def construct(self, x, mask):
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        scores = ops.matmul(q * self.size**-0.5, k.transpose(0, 1, 3, 2)) + mask
        return self.out_proj(ops.matmul(ops.softmax(scores, -1), v).transpose(0, 2, 1, 3).reshape(x.shape))


class Mlp(nn.Cell):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Dense(shape.width, shape.mlp), nn.Dense(shape.mlp, shape.width)
        self.is_quick = shape.is_quick

    def construct(self, x):
        h = self.fc1(x)
        h = h * ops.sigmoid(1.702 * h) if self.is_quick else h * (ops.erf(h * 0.5**0.5) * 0.5 + 0.5)
        return self.fc2(h)


class Layer(nn.Cell):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm((shape.width,), epsilon=shape.eps)
        self.self_attn = Attention(shape)
        self.layer_norm2 = nn.LayerNorm((shape.width,), epsilon=shape.eps)
        self.mlp = Mlp(shape)

    def construct(self, x, mask):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Cell):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.CellList([Layer(shape) for _ in range(shape.layers)])

    def construct(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Embedding(nn.Cell):
    """A table, as `weight`."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = Parameter(initializer("zeros", (rows, width), ms.float32))


class PatchEmbedding(nn.Cell):
    """A convolution whose stride is its kernel: a product of patches."""

    def __init__(self, width: int, patch: int, has_bias: bool) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        self.weight = Parameter(initializer("zeros", (width, 3, patch, patch), ms.float32))
        self.bias = Parameter(initializer("zeros", (width,), ms.float32)) if has_bias else 0.0

    def construct(self, pixels):
        batch, channels, height, width = pixels.shape
        rows, columns = height // self.patch, width // self.patch
        x = pixels.reshape(batch, channels, rows, self.patch, columns, self.patch)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        return ops.matmul(x, self.weight.reshape(self.width, -1).T) + self.bias


class ImageEmbeddings(nn.Cell):
    def __init__(self, width: int, patch: int, positions: int, has_bias: bool) -> None:
        super().__init__()
        self.class_embedding = Parameter(initializer("zeros", (width,), ms.float32))
        self.patch_embedding = PatchEmbedding(width, patch, has_bias)
        self.position_embedding = Embedding(positions, width)

    def construct(self, pixels):
        x = self.patch_embedding(pixels)
        first = ops.broadcast_to(self.class_embedding.reshape(1, 1, -1), (x.shape[0], 1, x.shape[2]))
        return ops.cat((first, x), 1) + self.position_embedding.weight


class ImageTower(nn.Cell):
    """Pixels (B, 3, H, W), normalised, to the class token after the last norm (B, width)."""

    def __init__(self, shape: Shape, patch: int, positions: int, is_clip: bool) -> None:
        super().__init__()
        self.embeddings = ImageEmbeddings(shape.width, patch, positions, not is_clip)
        self.is_clip = is_clip
        if is_clip:
            self.pre_layrnorm = nn.LayerNorm((shape.width,), epsilon=shape.eps)
        self.encoder = Encoder(shape)
        self.post_layernorm = nn.LayerNorm((shape.width,), epsilon=shape.eps)

    def construct(self, pixels):
        x = self.embeddings(pixels)
        if self.is_clip:
            x = self.pre_layrnorm(x)
        return self.post_layernorm(self.encoder(x, 0.0)[:, 0])


class TextEmbeddings(nn.Cell):
    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = Embedding(vocabulary, width), Embedding(length, width)

    def construct(self, token_ids):
        return ops.gather(self.token_embedding.weight, token_ids, 0) + self.position_embedding.weight


class TextTower(nn.Cell):
    """Token ids (B, L) to the states after the last norm (B, L, width); each sees what stands before it."""

    def __init__(self, shape: Shape, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(vocabulary, length, shape.width)
        self.encoder = Encoder(shape)
        self.final_layer_norm = nn.LayerNorm((shape.width,), epsilon=shape.eps)
        self.mask = Tensor(np.triu(np.full((length, length), -1e9, np.float32), 1))

    def construct(self, token_ids):
        return self.final_layer_norm(self.encoder(self.embeddings(token_ids), self.mask))


class Clip(nn.Cell):
    """Images and texts as unit vectors of one space."""

    def __init__(self, arrays: Arrays, config: Mapping) -> None:
        super().__init__()
        vision, text = config.get("vision_config", {}), config.get("text_config", {})
        rows, width = arrays.shape("text_model.embeddings.token_embedding.weight")
        length = arrays.shape("text_model.embeddings.position_embedding.weight")[0]
        positions, _ = arrays.shape("vision_model.embeddings.position_embedding.weight")
        patch = arrays.shape("vision_model.embeddings.patch_embedding.weight")[-1]
        its_shape = shape_of(arrays, "vision_model.", vision, "quick_gelu", 1e-5)
        self.vision_model = ImageTower(its_shape, patch, positions, is_clip=True)
        self.text_model = TextTower(shape_of(arrays, "text_model.", text, "quick_gelu", 1e-5), rows, length)
        size = arrays.shape("visual_projection.weight")[0]
        self.visual_projection = nn.Dense(its_shape.width, size, has_bias=False)
        self.text_projection = nn.Dense(width, size, has_bias=False)
        self.side, self.length = int((positions - 1) ** 0.5) * patch, length


class Images(nn.Cell):
    """Of Clip: pixels to vectors (B, D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__(auto_prefix=False)
        self.clip = clip

    def construct(self, pixels):
        return unit(self.clip.visual_projection(self.clip.vision_model(pixels)))


class Texts(nn.Cell):
    """Of Clip: token ids, and the place of the end mark in each, to vectors (B, D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__(auto_prefix=False)
        self.clip = clip

    def construct(self, token_ids, is_end):
        states = self.clip.text_model(token_ids)
        return unit(self.clip.text_projection((states * is_end.expand_dims(-1)).sum(1)))


class Dino(nn.Cell):
    """Pixels to vectors (B, width)."""

    def __init__(self, arrays: Arrays, config: Mapping) -> None:
        super().__init__()
        positions = arrays.shape("embeddings.position_embedding.weight")[-2]
        patch = arrays.shape("embeddings.patch_embedding.weight")[-1]
        shape = shape_of(arrays, "", config, "gelu", 1e-12)
        self.tower = ImageTower(shape, patch, positions, is_clip=False)
        self.side = int((positions - 1) ** 0.5) * patch

    def construct(self, pixels):
        return unit(self.tower(pixels))


def unit(x):
    return x / ops.sqrt(ops.square(x).sum(-1, keepdims=True))


def shape_of(arrays: Arrays, prefix: str, config: Mapping, activation: str, eps: float) -> Shape:
    """Of the transformer under a prefix."""
    numbers = [re.match(rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.", name) for name in arrays]
    mlp, width = arrays.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")
    return Shape(
        width,
        1 + max(int(match[1]) for match in numbers if match),
        config.get("num_attention_heads", max(1, width // HEAD)),
        mlp,
        config.get("layer_norm_eps", eps),
        config.get("hidden_act", activation) == "quick_gelu",
    )


def read_judge(path: Path) -> tuple[Arrays, dict]:
    """The weights of a folder of transformers or a single file, and the folder's config.json.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    if not path.is_dir():
        file, config = path, {}
    else:
        file = next((path / name for name in CLIP_NAMES if (path / name).is_file()), None)
        if file is None:
            raise ValueError(f"{path}: has none of {', '.join(CLIP_NAMES)}")
        its = path / "config.json"
        config = json.loads(its.read_text(encoding="utf-8")) if its.is_file() else {}
    return read_file(file), config


def load_clip(path: Path) -> Clip:
    """Raises ValueError where it is no CLIP of transformers."""
    arrays, config = read_judge(path)
    if "visual_projection.weight" not in arrays:
        raise ValueError(f"{path}: no CLIP in transformers' names; openai/clip-vit-base-patch32 is one")
    return filled(Clip(arrays, config), arrays, path)


def load_dino(path: Path) -> Dino:
    """Raises ValueError where it is no vision transformer."""
    arrays, config = read_judge(path)
    named = {}
    for name, values in arrays.items():
        for old, new in DINO_NAMES:
            name = re.sub(old, new, name)
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", np.split(values, 3)):
                named[name.replace("attn.qkv", f"self_attn.{part}_proj")] = piece
        else:
            named[name] = values
    if "embeddings.class_embedding" not in named:
        raise ValueError(f"{path}: no vision transformer in known names; facebook/dino-vits16 is one")
    whole = {f"tower.{name}": values for name, values in named.items()}
    return filled(Dino(ArraysInMemory(named), config), whole, path)


def filled(network: nn.Cell, arrays: Mapping[str, np.ndarray], path: Path) -> nn.Cell:
    """With every weight from the file. Raises ValueError where one is missing, or more are there."""
    parameters = {}
    for name, parameter in network.parameters_and_names():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        parameters[name] = parameter
    used = {
        name: values.reshape(parameters[name].shape)
        if name in parameters and values.size == parameters[name].size
        else values
        for name, values in arrays.items()
        if not UNUSED.fullmatch(name.removeprefix("tower."))
    }
    fill(parameters, used, str(path))
    return network.set_train(False)

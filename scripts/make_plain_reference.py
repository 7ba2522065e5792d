"""Computes the stored values of plain detectors with mmdetection: the reference of tests/test_reference_parity.py.

    python -m venv torchenv && torchenv/bin/pip install torch mmengine==0.10.5 scipy shapely terminaltables pycocotools \
        && torchenv/bin/pip install --no-deps mmcv-lite==2.1.0 mmdet==3.3.0
    torchenv/bin/python scripts/make_plain_reference.py [--output tests/reference_values/official]

The detectors are those of mmdetection's own config files, made small, with random weights; the sizes and the images are in
`config.json` and `inputs.npz` in the folder. Each gets three files, which hold what those of the official models do:
`NAME_state_dict.npz`, `NAME_eval.npz` (stages and detections) and `NAME_train.npz` (stages, losses, gradients of a step).
Those with five levels get a fourth, `NAME_border_eval.npz` (tokens inside, queries, detections).

mmcv-lite is mmcv without its compiled operations. Of these the detectors need NMS, which is computed here.
"""

import argparse
import functools
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "tests/reference_values/official"
# Name of the files -> mmdetection's config, and its number of levels.
MODELS = {
    "plain_dino": ("dino/dino-4scale_r50_8xb2-12e_coco", 4),
    "plain_ddq_5scale": ("ddq/ddq-detr-5scale_r50_8xb2-12e_coco", 5),
    "plain_deformable_detr": ("deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco", 4),
}
SEED = 0
# IoU above which queries of the DDQ detector suppress one another; at the published 0.8 none would, with random weights.
NMS_THRESHOLD = 0.5


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
    """mmcv's operation: indices of the survivors by falling score; `offset` is added to sides."""
    order = scores.sort(0, descending=True)[1]
    x1, y1, x2, y2 = boxes[order].unbind(1)
    areas = (x2 - x1 + offset) * (y2 - y1 + offset)
    keep = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order) - 1):
        if keep[i]:
            width = (torch.minimum(x2[i], x2[i + 1 :]) - torch.maximum(x1[i], x1[i + 1 :]) + offset).clamp(min=0)
            height = (torch.minimum(y2[i], y2[i + 1 :]) - torch.maximum(y1[i], y1[i + 1 :]) + offset).clamp(min=0)
            overlap = width * height
            keep[i + 1 :] &= ~(overlap / (areas[i] + areas[i + 1 :] - overlap) > iou_threshold)
    return order[keep]


class Operations(types.ModuleType):
    """Takes the place of mmcv's compiled module."""

    nms = staticmethod(nms)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"mmcv's operation {name}")

        return missing


sys.modules["mmcv._ext"] = Operations("mmcv._ext")

import mmdet.models  # noqa: E402
from mmdet.models.detectors import DeformableDETR  # noqa: E402
from mmdet.models.layers import transformer  # noqa: E402
from mmdet.registry import MODELS as REGISTRY  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402


def small_config(name: str, sizes: dict[str, Any]) -> Any:
    """The part `model` of mmdetection's config, in the sizes of `config.json`."""
    path, levels = MODELS[name]
    config = Config.fromfile(Path(mmdet.models.__file__).parent.parent / ".mim/configs" / f"{path}.py").model
    channels, base = sizes["embed_dims"], sizes["backbone_base_channels"]
    config.data_preprocessor = None
    config.backbone.update(base_channels=base, stem_channels=base, init_cfg=None)
    config.neck.update(in_channels=[4 * base * 2**stage for stage in range(5 - levels, 4)], out_channels=channels)
    config.neck.norm_cfg.num_groups = sizes["neck_num_groups"]
    config.num_queries = sizes["num_queries"]
    deformable = {
        "embed_dims": channels,
        "num_levels": levels,
        "num_heads": sizes["num_heads"],
        "num_points": sizes["num_points"],
    }
    for part, layers in ((config.encoder, sizes["encoder_num_layers"]), (config.decoder, sizes["decoder_num_layers"])):
        part.num_layers = layers
        part.layer_cfg.ffn_cfg.update(embed_dims=channels, feedforward_channels=sizes["feedforward_channels"])
    config.encoder.layer_cfg.self_attn_cfg.update(deformable)
    config.decoder.layer_cfg.cross_attn_cfg.update(deformable)
    config.decoder.layer_cfg.self_attn_cfg.update(embed_dims=channels, num_heads=sizes["num_heads"])
    config.positional_encoding.num_feats = channels // 2
    config.bbox_head.update(num_classes=sizes["num_classes"], embed_dims=channels)
    if "dn_cfg" in config:
        config.dn_cfg.group_cfg.num_dn_queries = sizes["num_dn_queries"]
    else:
        # Without dropout, whose random numbers no other code can draw.
        config.encoder.layer_cfg.self_attn_cfg.dropout = config.encoder.layer_cfg.ffn_cfg.ffn_drop = 0.0
        config.decoder.layer_cfg.cross_attn_cfg.dropout = config.decoder.layer_cfg.ffn_cfg.ffn_drop = 0.0
        config.decoder.layer_cfg.self_attn_cfg.dropout = 0.0
    config.test_cfg.max_per_img = sizes["max_per_image"]
    if "dqs_cfg" in config:
        config.dqs_cfg.iou_threshold = NMS_THRESHOLD
    return config


def narrow_box_encodings(channels: int) -> None:
    """mmdetection encodes boxes with 128 numbers a coordinate, whatever the width: gives them half of the width."""
    utils: Any = transformer.utils
    encode = utils.coordinate_to_encoding

    def narrow(coordinates: torch.Tensor, num_feats: int = channels // 2, **settings: Any) -> torch.Tensor:
        return encode(coordinates, num_feats=channels // 2, **settings)

    for module in list(sys.modules.values()):
        if getattr(module, "coordinate_to_encoding", None) is encode and module is not utils:
            vars(module)["coordinate_to_encoding"] = narrow
    encode_proposals = DeformableDETR.get_proposal_pos_embed
    DeformableDETR.get_proposal_pos_embed = staticmethod(functools.partial(encode_proposals, num_pos_feats=channels // 2))


def build(name: str, sizes: dict[str, Any]) -> Any:
    """A detector with random weights, none of which is a constant, in evaluation mode."""
    torch.manual_seed(SEED)
    narrow_box_encodings(sizes["embed_dims"])
    model = REGISTRY.build(small_config(name, sizes))
    model.init_weights()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.1)
            if "reg_branches" in path and path.endswith("4.weight"):
                # Boxes move so far between layers that some come to overlap.
                parameter += torch.randn_like(parameter)
        for path, buffer in model.named_buffers():
            if path.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
            elif path.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model.eval()


def without_padding(inputs: Any) -> Any:
    """The inputs with images that fill the batch. The proposals of padding enter mmdetection's losses of Deformable DETR."""
    return {**inputs, "image_sizes_hw": np.full_like(inputs["image_sizes_hw"], inputs["images"].shape[-2:])}


def samples(inputs: Any) -> list[DetDataSample]:
    """The images' sizes and ground truth."""
    found = []
    for image, (height, width) in enumerate(inputs["image_sizes_hw"].tolist()):
        size = (height, width)
        sample = DetDataSample(
            metainfo={
                "img_shape": size,
                "batch_input_shape": inputs["images"].shape[-2:],
                "ori_shape": size,
                "scale_factor": (1.0, 1.0),
            }
        )
        boxes = torch.as_tensor(inputs[f"gt_boxes_xyxy.{image}"]).reshape(-1, 4).float()
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.as_tensor(inputs[f"gt_labels.{image}"]).long())
        found.append(sample)
    return found


class Record:
    """Runs a detector, and keeps what passes between its parts."""

    def __init__(self, model: Any, batch: list[DetDataSample]):
        self.model, self.batch = model, batch
        self.arrays: dict[str, torch.Tensor] = {}

    def run(self, images: torch.Tensor) -> dict[str, Any]:
        """Backbone to decoder; returns what the head is given."""
        backbone = self.model.backbone(images)
        neck = self.model.neck(backbone)
        for name, maps in (("backbone", backbone), ("neck", neck)):
            self.arrays |= {f"{name}.{level}": map_ for level, map_ in enumerate(maps)}
        encoder, decoder = self.model.pre_transformer(neck, self.batch)
        encoded = self.model.forward_encoder(**encoder)
        self.arrays["encoder_memory"] = encoded["memory"]
        more = {} if type(self.model) is DeformableDETR else {"batch_data_samples": self.batch}
        queries, head = self.model.pre_decoder(**encoded, **more)
        for key in ("query", "query_pos", "reference_points", "dn_mask"):
            if queries.get(key) is not None:
                self.arrays[f"pre_decoder.decoder.{key}"] = queries[key]
        for key in ("enc_outputs_class", "enc_outputs_coord", "aux_enc_outputs_class", "aux_enc_outputs_coord"):
            if head.get(key) is not None:
                self.arrays[f"pre_decoder.head.{key}"] = head[key]
        for key, value in (head.get("dn_meta") or {}).items():
            self.arrays[f"pre_decoder.head.dn_meta.{key}"] = torch.tensor(value)
        outputs = self.model.forward_decoder(**decoder, **queries)
        self.arrays["decoder.0"] = outputs["hidden_states"]
        self.arrays["decoder.1"] = torch.stack(list(outputs["references"]))
        for layer, mask in enumerate(getattr(self.model.decoder, "cache_dict", {}).get("distinct_query_mask", [])):
            # It is repeated for each head.
            heads = self.model.decoder.layers[0].self_attn.num_heads
            self.arrays[f"distinct_query_mask.{layer}"] = mask.reshape(len(self.batch), heads, *mask.shape[1:])[:, 0]
        return head | outputs

    def numpy(self) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy() for name, value in self.arrays.items()}


def evaluate(model: Any, inputs: Any) -> dict[str, np.ndarray]:
    record = Record(model.eval(), samples(inputs))
    with torch.no_grad():
        head = record.run(torch.as_tensor(inputs["images"]))
        found = model.bbox_head.predict(
            head["hidden_states"], head["references"], batch_data_samples=record.batch, rescale=False
        )
    for image, detections in enumerate(found):
        record.arrays |= {
            f"pred.{image}.scores": detections.scores,
            f"pred.{image}.labels": detections.labels,
            f"pred.{image}.boxes_xyxy": detections.bboxes,
        }
    return record.numpy()


def border_images(inputs: Any) -> list[np.ndarray]:
    """Images `[3, h, w]` whose finest of five levels has 250 columns or 250 rows. In exact numbers one of these lies at the
    border near which tokens do not count as inside; mmdetection's float32 puts it on one side."""
    wide = inputs["image.2"].astype(np.float32)
    return [wide[:, :, :1000], wide[:, :, 1000:].swapaxes(1, 2)]


def evaluate_border(model: Any, inputs: Any) -> dict[str, np.ndarray]:
    """Which tokens are inside, queries and detections, for each image alone."""
    generate, inside = model.gen_encoder_output_proposals, []

    def record(*arguments: Any) -> Any:
        memory, proposals = generate(*arguments)
        inside.append(np.isfinite(proposals.numpy()).all(axis=-1))
        return memory, proposals

    model.gen_encoder_output_proposals = record
    arrays = {}
    for image, pixels in enumerate(border_images(inputs)):
        size = np.array([pixels.shape[1:]])
        nothing = {"gt_boxes_xyxy.0": np.zeros((0, 4)), "gt_labels.0": np.zeros(0, int)}
        found = evaluate(model, {"images": pixels[None], "image_sizes_hw": size, **nothing})
        arrays[f"encoder_inside.{image}"] = inside[-1]
        kept = ("pred.0.scores", "pred.0.labels", "pred.0.boxes_xyxy")
        arrays |= {name.replace(".0.", f".{image}."): found[name] for name in kept}
        name = "pre_decoder.decoder.reference_points"
        arrays[f"{name}.{image}"] = found[name]
    model.gen_encoder_output_proposals = generate
    return arrays


def train(model: Any, inputs: Any) -> dict[str, np.ndarray]:
    torch.manual_seed(SEED)
    model.train()
    record = Record(model, samples(inputs))
    head = record.run(torch.as_tensor(inputs["images"]))
    losses = model.bbox_head.loss(**head, batch_data_samples=record.batch)
    total = torch.zeros(())
    for name, value in losses.items():
        values = value if isinstance(value, list) else [value]
        for image, part in enumerate(values):
            record.arrays[f"loss.{name}.{image}" if isinstance(value, list) else f"loss.{name}"] = part
        total = total + sum(part.sum() for part in values)
    record.arrays["loss_total"] = total
    model.zero_grad()
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name.startswith("backbone."):
            record.arrays[f"grad_norm.{name}"] = parameter.grad.norm()
        elif parameter.grad is not None:
            record.arrays[f"grad.{name}"] = parameter.grad
    return record.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the files")
    parser.add_argument("--only", choices=MODELS, help="one of the detectors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_default_scope("mmdet")
    sizes = json.loads((FOLDER / "config.json").read_text())
    inputs = dict(np.load(FOLDER / "inputs.npz"))
    for name in [arguments.only] if arguments.only else MODELS:
        model = build(name, sizes)
        weights = {path: value.numpy() for path, value in model.state_dict().items()}
        train_inputs = without_padding(inputs) if type(model) is DeformableDETR else inputs
        files = {"state_dict": weights, "eval": evaluate(model, inputs), "train": train(model, train_inputs)}
        if MODELS[name][1] == 5:
            files["border_eval"] = evaluate_border(model.eval(), dict(np.load(FOLDER / "border_inputs.npz")))
        for part, arrays in files.items():
            np.savez_compressed(arguments.output / f"{name}_{part}.npz", **arrays)
            print(name, part, len(arrays), "arrays")


if __name__ == "__main__":
    main()

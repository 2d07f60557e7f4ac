"""CLIP-ReID's person re-identification model around CLIP's image tower: camera and view embeddings, two classifiers.

    f_last, f, f_proj = the class tokens of the tower's three outputs, given sie_coe · cv_embed[camera, view] as cv_emb

Source: Li, Sun, Li, "CLIP-ReID: Exploiting Vision-Language Model for Image Re-identification without Concrete Text
Labels", 2023.
"""

from typing import Any

import torch
from torch import nn

from vit_fast.checkpoints.loading import load_state_dict, loads
from vit_fast.checkpoints.report import log_left_out

from . import arguments, clip

_TEXT_SIDE = ("text_encoder.", "prompt_learner.")


class ReID(nn.Module):
    """CLIP-ReID's classifier around the tower, with camera and view embeddings.

    forward(images, cam_label, view_label), labels [B] where the model has tables for them:
    training → ([scores, projected scores], [f_last, f, f_proj], f_proj), the class tokens of the tower's three outputs;
    evaluation → [B, D + output_dim]: cat(f, f_proj), or of their batch norms with neck_feat "after".
    """

    def __init__(
        self,
        tower: clip.ImageTower,
        num_classes: int,
        camera_num: int = 0,
        view_num: int = 0,
        sie_coe: float = 3.0,
        neck_feat: str = "before",
    ) -> None:
        super().__init__()
        self.neck_feat = arguments.one_of("clip_reid", "neck_feat", neck_feat, ("before", "after"))
        if tower.variant != "clip_reid" or tower.proj is None or tower.output_dim is None:
            arguments.fail("clip_reid", "tower", tower.variant, "'clip_reid' with an output_dim")
        num_classes = arguments.integer("clip_reid", "num_classes", num_classes)
        self.camera_num = arguments.integer("clip_reid", "camera_num", camera_num, 0)
        self.view_num = arguments.integer("clip_reid", "view_num", view_num, 0)
        self.sie_coe = sie_coe
        like: dict[str, Any] = {"device": tower.proj.device, "dtype": tower.class_embedding.dtype}
        self.classifier = nn.Linear(tower.width, num_classes, bias=False, **like)
        self.classifier_proj = nn.Linear(tower.output_dim, num_classes, bias=False, **like)
        self.bottleneck = nn.BatchNorm1d(tower.width, **like)
        self.bottleneck_proj = nn.BatchNorm1d(tower.output_dim, **like)
        for classifier, neck in ((self.classifier, self.bottleneck), (self.classifier_proj, self.bottleneck_proj)):
            nn.init.normal_(classifier.weight, std=0.001)
            neck.bias.requires_grad_(False)
        self.image_encoder = tower
        rows = max(self.camera_num, 1) * max(self.view_num, 1) if self.camera_num or self.view_num else 0
        self.cv_embed = nn.Parameter(torch.empty(rows, tower.width, **like)) if rows else None
        if self.cv_embed is not None:
            nn.init.trunc_normal_(self.cv_embed, std=0.02)

    def _side_information(self, cam_label: Any, view_label: Any, batch: int) -> Any:
        index = 0
        for name, label, number in (
            ("cam_label", cam_label, self.camera_num),
            ("view_label", view_label, self.view_num),
        ):
            if (label is not None) != (number > 0):
                arguments.fail(
                    "clip_reid", name, label, "labels" if number else "None (the model has no table for them)"
                )
            if number:
                index = index * number + label
        if self.cv_embed is None:
            return None
        return (self.sie_coe * self.cv_embed[index]).expand(batch, -1)

    def forward(
        self, images: torch.Tensor, cam_label: torch.Tensor | None = None, view_label: torch.Tensor | None = None
    ) -> Any:
        arguments.check_traceable("clip_reid", images)
        side = self._side_information(cam_label, view_label, images.shape[0])
        last, feature, projected = (tokens[:, 0] for tokens in self.image_encoder(images, side))
        if not self.training and self.neck_feat == "before":
            return torch.cat([feature, projected], dim=1)
        neck, neck_proj = self.bottleneck(feature), self.bottleneck_proj(projected)
        if not self.training:
            return torch.cat([neck, neck_proj], dim=1)
        return [self.classifier(neck), self.classifier_proj(neck_proj)], [last, feature, projected], projected


def build(
    num_classes: int,
    camera_num: int = 0,
    view_num: int = 0,
    sie_coe: float = 3.0,
    neck_feat: str = "before",
    **tower_kwargs: Any,
) -> ReID:
    """The whole image model.

    Args:
        num_classes: identities.
        camera_num, view_num: rows of the table of side information, cameras · views; 0 for none.
        sie_coe: factor on that table.
        neck_feat: whether evaluation returns the features "before" or "after" the batch norms.
        tower_kwargs: arguments of ``clip.build("clip_reid", ...)``.
    """
    tower = clip.build("clip_reid", **tower_kwargs)
    return ReID(tower, num_classes, camera_num, view_num, sie_coe, neck_feat)


@loads(ReID)
def load(model: ReID, source: arguments.Source, old_grid: tuple[int, int] | None = None) -> ReID:
    """Loads a checkpoint of CLIP-ReID, without its text tower, or the image tower of a CLIP alone; strict.

    Arguments and errors as in ``clip.load``.
    """
    state = clip.read(source)
    if not any(key.startswith("classifier.") for key in state):
        clip.load(model.image_encoder, source, old_grid)
        return model
    log_left_out("systems.clip_reid", [(key, "the text side") for key in state if key.startswith(_TEXT_SIDE)])
    state = {key: value for key, value in state.items() if not key.startswith(_TEXT_SIDE)}
    clip.fit_table(state, "image_encoder.positional_embedding", model.image_encoder, old_grid)
    return load_state_dict(model, state)

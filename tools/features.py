"""Features of any timm model, for fid.py --features: FD-<model> in the place of FID."""
import timm
import torch
import torch.nn.functional as F

from models import UserError, first_line, state_hash


class TimmFeatures(torch.nn.Module):
    """The pooled features (class token or average, as the model has it) of any timm model."""

    def __init__(self, name, weights=None):
        super().__init__()
        source = dict(pretrained_cfg_overlay=dict(file=str(weights), custom_load=False)) if weights else {}
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0, **source).eval()
        except Exception as error:
            raise UserError(f"--features {name}: timm cannot build it with its weights ({first_line(error)}); choose "
                            "another, or give a file in timm's key names with --features-weights") from None
        self.data = timm.data.resolve_model_data_config(self.model)
        self.side, self.dims = self.data["input_size"][-1], dict(pool=self.model.num_features)
        self.about = dict(name=name, weights=state_hash(self.model.state_dict()), published=True,
                          resize=f"antialiased bicubic to {self.side}x{self.side}")

    @torch.no_grad()
    def forward(self, images):
        x = F.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255) / 255
        mean, std = (x.new_tensor(self.data[key]).view(3, 1, 1) for key in ("mean", "std"))
        return dict(pool=self.model((x - mean) / std))

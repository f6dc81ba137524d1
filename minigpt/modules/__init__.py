"""The stages as LightningModules: one shared base, one short file each."""

from minigpt.modules.dpo import DPOModule
from minigpt.modules.lora import LoRAModule
from minigpt.modules.pretrain import PretrainModule
from minigpt.modules.sft import SFTModule

__all__ = ["DPOModule", "LoRAModule", "PretrainModule", "SFTModule"]

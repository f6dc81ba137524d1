"""The stages as LightningModules: one shared base, one short file each."""

from minigpt.stages.dpo import DPOModule
from minigpt.stages.grpo import GRPOModule
from minigpt.stages.kto import KTOModule
from minigpt.stages.lora import LoRAModule
from minigpt.stages.pretrain import PretrainModule
from minigpt.stages.reward import RewardModule
from minigpt.stages.sft import SFTModule

__all__ = [
    "DPOModule",
    "GRPOModule",
    "KTOModule",
    "LoRAModule",
    "PretrainModule",
    "RewardModule",
    "SFTModule",
]

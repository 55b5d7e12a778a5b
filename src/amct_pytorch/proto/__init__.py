"""Messages of the protobuf schemas that the toolkit reads and writes."""

from amct_pytorch.proto.basic_info_pb2 import AttrProto, AutoChannelPruneConfig
from amct_pytorch.proto.calibration_config_pb2 import AMCTConfig
from amct_pytorch.proto.distill_config_pb2 import AMCTDistillConfig
from amct_pytorch.proto.quant_cali_config_pb2 import AMCTQuantCaliConfig
from amct_pytorch.proto.retrain_config_pb2 import AMCTRetrainConfig
from amct_pytorch.proto.scale_offset_record_pb2 import (
    MapFiledEntry,
    PruneNode,
    PruneRecord,
    ScaleOffsetRecord,
)

__all__ = [
    "AMCTConfig",
    "AMCTDistillConfig",
    "AMCTQuantCaliConfig",
    "AMCTRetrainConfig",
    "AttrProto",
    "AutoChannelPruneConfig",
    "MapFiledEntry",
    "PruneNode",
    "PruneRecord",
    "ScaleOffsetRecord",
]

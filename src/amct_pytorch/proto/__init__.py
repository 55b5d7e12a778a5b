"""Messages of the protobuf schemas that the toolkit reads and writes."""

from amct_pytorch.proto.calibration_config_pb2 import AMCTConfig
from amct_pytorch.proto.quant_cali_config_pb2 import AMCTQuantCaliConfig
from amct_pytorch.proto.scale_offset_record_pb2 import MapFiledEntry, ScaleOffsetRecord

__all__ = ["AMCTConfig", "AMCTQuantCaliConfig", "MapFiledEntry", "ScaleOffsetRecord"]

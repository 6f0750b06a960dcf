"""The hot paths of the adapters, each usable by itself; importing this imports no Triton."""

from .bottleneck.bottleneck import bottleneck as bottleneck
from .bottleneck.rows import bottleneck_rows as bottleneck_rows
from .dora import dora_norm as dora_norm
from .dropped import dropped as dropped
from .lora.convolution import lora_convolution as lora_convolution
from .lora.embedding import lora_embedding as lora_embedding
from .lora.linear import join_pairs as join_pairs
from .lora.linear import lora_add as lora_add
from .lora.linear import lora_linear as lora_linear
from .lora.rows import Segments as Segments
from .lora.rows import lora_linear_rows as lora_linear_rows
from .lora.rows import serves_rows as serves_rows

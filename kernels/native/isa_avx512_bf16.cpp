#include "isa.h"

extern const Ops ops_avx512_bf16 = QUIRE_OPS;

#include "isa.h"

extern const Ops ops_avx512_vnni = QUIRE_OPS;

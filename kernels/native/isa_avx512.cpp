#include "isa.h"

extern const Ops ops_avx512 = QUIRE_OPS;

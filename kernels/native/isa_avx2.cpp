#include "isa.h"

extern const Ops ops_avx2 = QUIRE_OPS;

#include "isa.h"

extern const Ops ops_generic = QUIRE_OPS;

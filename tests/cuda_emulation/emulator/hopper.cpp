// mbarriers and bulk copies.
#include "emulator/machine.h"

namespace fastattn::cuda::emulation {

bool land_bulk_copy(Block&) { return false; }
void finish_hopper(Block&) {}
void reset_hopper(Block&) {}
std::string describe_mbarrier(Block&, uint32_t) { return ""; }

}  // namespace fastattn::cuda::emulation

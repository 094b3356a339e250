#include "mutation/switch.h"

namespace fastattn::mutation {

int active = -1;
unsigned char matters[kMost] = {};

}  // namespace fastattn::mutation

extern "C" {

__attribute__((visibility("default"))) void fastattn_mutation_activate(int id) { fastattn::mutation::active = id; }

// Copies which mutants would have made a difference since it was last asked.
__attribute__((visibility("default"))) void fastattn_mutation_matters(unsigned char* to, int count) {
    for (int id = 0; id < count; ++id) {
        to[id] = fastattn::mutation::matters[id];
        fastattn::mutation::matters[id] = 0;
    }
}
}

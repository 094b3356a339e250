// Checks that throw with the values in the message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastattn {

// Throws std::runtime_error with all parts in one message unless the condition holds.
template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream message;
    message << "fastattn: ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

}  // namespace fastattn

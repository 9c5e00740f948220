// Weights of linear layers are packed in panels of so many outputs, whatever their type.
#pragma once

namespace {

constexpr int kPanel = 64;

}  // namespace

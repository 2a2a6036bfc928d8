// The one CUDA header that a torch without CUDA lacks: its build generates it, with macros that nothing here depends on.
#pragma once

"""Offsets into a row of the table on the device: `fastcfg.table.DEVICE_COLUMNS` by index (a test compares the two).

Kernels import the names one by one: only then are the values part of the key that Triton caches compiled kernels by.
"""

import triton.language as tl

C_IN = tl.constexpr(0)
T = tl.constexpr(1)
P_X = tl.constexpr(2)
P_M = tl.constexpr(3)
A_X = tl.constexpr(4)
A_0 = tl.constexpr(5)
A_M = tl.constexpr(6)
A_U = tl.constexpr(7)
A_H0 = tl.constexpr(8)
A_H1 = tl.constexpr(9)
A_H2 = tl.constexpr(10)
S = tl.constexpr(11)
L_0 = tl.constexpr(12)
L_V = tl.constexpr(13)
K_X = tl.constexpr(14)
K_0 = tl.constexpr(15)
K_M = tl.constexpr(16)
SLOT = tl.constexpr(17)
P_G = tl.constexpr(18)
A_G = tl.constexpr(19)
P_X_REST = tl.constexpr(20)
P_M_REST = tl.constexpr(21)
A_X_REST = tl.constexpr(22)

WIDTH = tl.constexpr(23)

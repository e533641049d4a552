"""The value of a tree: one walk, four kinds of arithmetic. Here fractions and a prime field,
in reals.py 80 digits and sympy. A domain makes numbers and symbols that know + and *, and has
power, call and check."""

import functools
import hashlib
import math
import secrets
from fractions import Fraction
from typing import NamedTuple

from verify.tree import MAX_BITS, VALUES, Node, NotMath, children, never


def evaluate(node: Node, domain):
    op, args = node
    if op in ("num", "dec"):
        return domain.number(args[0])
    if op == "sym":
        return domain.symbol(args[0])
    if op not in VALUES:
        raise NotMath(op)
    value, *others = (evaluate(child, domain) for child in children(node))
    if op == "call":
        value = domain.call(args[0], [value, *others], node)
    elif op == "pct":
        value = value * domain.number(Fraction(1, 100))
    elif op == "pow":
        value = domain.power(value, others[0], exact(args[1]), root=False)
    elif op == "root":
        index = exact(args[1]) or never("index")
        value = domain.power(value, domain.number(1 / index), 1 / index, root=True)
    elif op == "add":
        for other in others:
            value = domain.check(value + other)
    elif op == "mul":
        for other in others:
            value = domain.check(value * other)
    return domain.check(value)


# --------------------------------------------------------------------------------------------------
# Fractions


class Irrational(Exception):
    """Not a tree of rationals, or one whose value has more than MAX_BITS."""


def bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def irrational(*_):
    raise Irrational


class Exact:
    number = Fraction
    symbol = irrational

    def check(self, value):
        return value if bits(value) <= MAX_BITS else irrational()

    def power(self, base, _, exponent, root):
        if root or exponent is None or exponent.denominator > 1:
            raise Irrational
        if base == 0 and exponent < 0:
            raise NotMath("division by zero")
        if base in (0, 1):
            return base if exponent else Fraction(1)
        if base == -1:
            return base ** int(exponent % 2)
        if bits(base) * abs(exponent) > MAX_BITS:  # its size, before it is computed
            raise Irrational
        return base ** int(exponent)

    def call(self, name, values, node):
        whole = all(value.denominator == 1 for value in values)
        if name == "factorial" and whole and 0 <= values[0] <= 900:
            return Fraction(math.factorial(int(values[0])))
        if name == "binom" and whole and 0 <= values[1] <= values[0] <= MAX_BITS:
            return Fraction(math.comb(*map(int, values)))
        rounding = {"abs": abs, "floor": math.floor, "ceil": math.ceil}
        return Fraction(rounding.get(name, irrational)(values[0]))


@functools.lru_cache(maxsize=8192)
def exact(node: Node) -> Fraction | None:
    """The value of a tree of rationals; None for any other, and for one of more than MAX_BITS."""
    if node.op in ("num", "dec"):
        return node.args[0]
    try:
        return evaluate(node, Exact())
    except Irrational:
        return None


# --------------------------------------------------------------------------------------------------
# A prime field. 2 M + 1 = P, both prime, and P = -1 modulo 8 and each prime to 151: the squares
# modulo P form a group of prime order M that holds these primes. So each square has one k-th root
# for each k, roots of products are products of roots, and exponents are numbers modulo M, in which
# sums, products and quotients work as they do in formulas.

ODD_PRIMES = [n for n in range(3, 152) if all(n % d for d in range(2, n))]
P = (2**55 + 332) * 8 * math.prod(ODD_PRIMES) - 1
M = P // 2
SALT = secrets.token_hex()  # nobody can look for a formula that vanishes at our random point


class Residue(NamedTuple):
    """The image of a number: re + im i modulo P where it is a base, modulo M as an exponent."""

    re: int
    im: int
    exponent: int

    def __add__(self, other):
        re = (self.re + other.re) % P
        im = (self.im + other.im) % P
        return Residue(re, im, (self.exponent + other.exponent) % M)

    def __mul__(self, other):
        re = (self.re * other.re - self.im * other.im) % P
        im = (self.re * other.im + self.im * other.re) % P
        return Residue(re, im, self.exponent * other.exponent % M)

    def __pow__(self, n: int):
        if n < 0:
            return self.inverse() ** -n
        exponent = pow(self.exponent, n, M)
        if self.im == 0:
            return Residue(pow(self.re, n, P), 0, exponent)
        out = ONE
        for bit in f"{n % (P * P - 1):b}":
            out = out * out
            if bit == "1":
                out = out * self
        return out._replace(exponent=exponent)

    def inverse(self):
        norm = (self.re * self.re + self.im * self.im) % P
        if norm == 0 or self.exponent == 0:
            raise NotMath("division by zero")
        factor = pow(norm, -1, P)
        return Residue(self.re * factor % P, -self.im * factor % P, pow(self.exponent, -1, M))


ONE = Residue(1, 0, 1)


class Modular:
    """Symbols, and whatever else has no value here, are random: the same for the same name and
    arguments."""

    def random(self, *key) -> Residue:
        digest = hashlib.shake_256(repr((SALT, *key)).encode()).digest(80)
        square = pow(int.from_bytes(digest[:40]), 2, P)  # thus positive
        return Residue(square, 0, int.from_bytes(digest[40:]) % M)

    def number(self, value):
        top = Residue(value.numerator % P, 0, value.numerator % M)
        if value.denominator == 1:
            return top
        return top * Residue(value.denominator % P, 0, value.denominator % M).inverse()

    def symbol(self, name):
        value = self.random(name)
        return value._replace(re=0, im=1) if name == "i" else value

    def check(self, value):
        return value

    def power(self, base, exponent, q, root=False):
        if q is not None and q.denominator == 1:
            return base ** int(q)
        if base.im or not base.re:
            return self.random("power", base, exponent)
        if pow(base.re, M, P) == 1:
            return self.positive_power(base, exponent)
        if q and (q.denominator == 2 or q.denominator % 2):
            sign = self.number(-1) if q.denominator % 2 else self.symbol("i")
            value = self.positive_power(base * self.number(-1), exponent)
            return value * sign**q.numerator
        return self.random("power", base, exponent)

    def positive_power(self, base, exponent):
        value = self.random("power", base.exponent, exponent.exponent)
        return value._replace(re=pow(base.re, exponent.exponent, P))

    def call(self, name, values, node):
        value = exact(node)
        if value is not None:
            return self.number(value)
        if name in ("sin", "cos"):  # by Euler's formula, so that the theorems on sums hold
            i = self.symbol("i")
            half = self.number(Fraction(1, 2))
            up = self.power(self.symbol("e"), i * values[0], None)
            down = up.inverse()
            if name == "cos":
                return (up + down) * half
            return (up + self.number(-1) * down) * half * i.inverse()
        return self.random(name, *values)

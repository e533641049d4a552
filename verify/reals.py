"""Values with 80 digits, proofs by sympy, and decimals."""

import functools
import random
from fractions import Fraction

from verify.tree import MIN_DIGITS, Limit, Node, NotMath, names, never
from verify.values import evaluate, exact

CALLS = {"sin", "cos", "ln", "abs", "factorial", "binom", "floor", "ceil"}
CALLS |= {"arcsin", "arccos", "arctan"}
SPELLED = {  # as mpmath and sympy spell them
    "ln": "log",
    "abs": "fabs",
    "binom": "binomial",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
}


@functools.cache
def context():
    import mpmath

    mp = mpmath.mp.clone()
    mp.dps = 80
    return mp


class Reals:
    """80 digits at a point {symbol: real value}. Errors are judged by the largest magnitude met."""

    def __init__(self, point):
        self.point = point
        self.largest = 1

    def number(self, value):
        return context().mpf(value.numerator) / value.denominator

    def symbol(self, name):
        mp = context()
        if name in self.point:
            return self.point[name]
        return +{"pi": mp.pi, "e": mp.e, "i": mp.j}.get(name, mp.nan)

    def check(self, value):
        size = abs(value)
        if not size < context().mpf(10) ** 10**6:  # nan, too
            raise Limit("magnitude")
        self.largest = max(self.largest, size)
        return value

    def real(self, value):
        """A root, symbolic power or logarithm of a negative number has no value in a formula with
        symbols."""
        mp = context()
        if self.point and mp.im(value) == 0 and mp.re(value) < 0:
            raise NotMath("negative")
        return value

    def power(self, base, exponent, q, root):
        mp = context()
        if base == 0:
            return mp.mpf(0) if mp.re(exponent) > 0 else never("division by zero")
        if abs(exponent) * (1 + abs(mp.log(abs(base)))) > 2 * 10**6:
            raise Limit("magnitude")
        if q is not None and q.denominator == 1:
            return base ** int(q)
        if q is None and mp.isint(exponent):
            return base ** int(mp.re(exponent))
        if root and q and q.denominator % 2 and mp.im(base) == 0 and mp.re(base) < 0:
            return -((-base) ** exponent)
        return self.real(base) ** exponent

    def call(self, name, values, node):
        mp = context()
        if name == "ln":
            return mp.log(self.real(values[0]))
        if name == "abs":
            return abs(values[0])
        if name not in CALLS:  # some function, the same for the same name and arguments
            digits = (mp.nstr(value, 40) for value in values)
            return mp.mpf(random.Random(" ".join([name, *digits])).random())
        if any(abs(value) > 10**5 for value in values):
            raise Limit(name)
        return getattr(mp, SPELLED.get(name, name))(*values)


def points(symbols):
    """Points at which formulas are compared. Each symbol is negative at some while the others are
    not: sqrt(x^2) is not x. Some are odd integers, at which a negative number has a power: nor is
    sqrt(x^2)^n equal to x^n."""
    rng = random.Random(7)
    mpf = context().mpf
    for scale in (0, 0.25, 100) if symbols else (0,):
        for negative in (None, *symbols):
            point = {}
            for symbol in symbols:
                value = rng.uniform(1, 3) * scale if scale else rng.randrange(11, 60, 2)
                point[symbol] = mpf(-value if symbol == negative else value)
            yield point


def evaluated(node: Node, point):
    """(value, bound of its error), or None where the node has no value or too large a one."""
    domain = Reals(point)
    try:
        return evaluate(node, domain), domain.largest * context().mpf(10) ** -60
    except (NotMath, Limit, ArithmeticError, ValueError):
        return None


def agree(a: Node, b: Node, once: bool) -> bool | None:
    """False if a and b differ at a point by more than rounding can explain, True if not, None if
    they have no values. `once`: one point with values is enough."""
    verdict = None
    for point in points(sorted(names(a) | names(b))):
        x = evaluated(a, point)
        y = evaluated(b, point)
        if x and y:
            if abs(x[0] - y[0]) > x[1] + y[1]:
                return False
            verdict = True
            if once:
                break
    return verdict


def rounds_to(node: Node, decimal: Node, digits: int = MIN_DIGITS) -> bool:
    """Whether the decimal is the value of `node` rounded to the digits written, at least `digits`
    significant ones."""
    value, written, place = decimal.args
    if written < digits or names(node):
        return False
    half = Fraction(10) ** place / 2
    rational = exact(node)
    if rational is not None:
        return abs(rational - value) <= half
    real = evaluated(node, {})
    if real is None:
        return False
    number = Reals({}).number
    return bool(abs(real[0] - number(value)) + real[1] <= number(half))


class Sympy:
    def __init__(self):
        import sympy

        self.sympy = sympy

    def number(self, value):
        return self.sympy.Rational(value.numerator, value.denominator)

    def symbol(self, name):
        constants = {"pi": self.sympy.pi, "e": self.sympy.E, "i": self.sympy.I}
        return constants.get(name) or self.sympy.Symbol(name)

    def check(self, value):
        return value

    def power(self, base, exponent, q, root):
        if q is not None and max(abs(q.numerator), q.denominator) > 300:
            raise Limit("exponent")
        if root and base.is_negative and q.denominator % 2:
            return self.sympy.real_root(base, 1 / exponent)
        return self.sympy.Pow(base, exponent)

    def call(self, name, values, node):
        if name not in CALLS or any(abs(exact(arg) or 0) > 300 for arg in node.args[1:]):
            raise Limit("call")
        spelled = {**SPELLED, "abs": "Abs", "ceil": "ceiling"}.get(name, name)
        return getattr(self.sympy, spelled)(*values)


def proven(a: Node, b: Node) -> bool:
    """Whether sympy proves a = b. It may take long: only for a process that its parent watches."""
    domain = Sympy()
    difference = evaluate(a, domain) - evaluate(b, domain)
    if not difference.free_symbols and difference.is_algebraic:
        x = domain.symbol("x")
        return domain.sympy.minimal_polynomial(difference, x) == x
    return difference.equals(0) is True

"""What reads a state, in which role, from where, how it runs, and by which operator.

Each cell is equal to the function of arrays, or it is refused by an error that names the state.
`REFUSED` says which may be. Where JAX cannot differentiate the function of arrays either, it is
an error as well. A sample runs by default. By `--nightly` run all cells of `vector_grad`, and
for each other operator all constructs in all roles.
"""

import functools
import itertools
import re

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vgrad_eqx as vg


W, X = jnp.array([0.5, -1.2, 2.0]), jnp.array([1.0, 2.0, 3.0])
NAME = "conductance"


def scan(get, x):
    return jax.lax.scan(lambda c, _: (jnp.sin(c * get()), c), x, length=3)[0]


def scan_over(get, x):
    return jax.lax.scan(lambda c, y: (c + y * get()[0], y * get()[1]), 0.0, x)[1] * get()


def reverse_scan(get, x):
    body = lambda c, y: (c * y + get(), c * get())
    return jax.lax.scan(body, x, x, reverse=True, unroll=2)[1][0]


def cond(get, x):
    return jax.lax.cond(x[0] > 0, lambda x: x * get(), lambda x: get(), x)


def switch(get, x):
    return jax.lax.switch(1, [lambda x: x, lambda x: x * get() ** 2], x)


def checkpointed_scan(get, x):
    body = jax.checkpoint(lambda c, _: (jnp.sin(c) * get(), None))
    return jax.lax.scan(body, x, length=3)[0]


def jitted_in_scan(get, x):
    helper = jax.jit(lambda c: jnp.sin(c) * get())
    return jax.lax.scan(lambda c, _: (helper(c), None), x, length=2)[0]


def twice_jitted(get, x):
    helper = jax.jit(lambda x: x * get())
    return helper(x) + helper(2 * x) * get()


def associative_scan(get, x):
    return jax.lax.associative_scan(lambda a, b: a * b + 0 * get()[0], x * get())


def inner_grad(get, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(x) * get() ** 2))(x)


def inner_jvp(get, x):
    return jax.jvp(lambda x: jnp.sin(x) * get(), (x,), (x,))[1] + get()


def inner_vjp(get, x):
    y, pull = jax.vjp(lambda x: jnp.sin(x) * get(), x)
    return pull(y)[0]


def linearize(get, x):
    y, push = jax.linearize(lambda x: x**2 * get(), x)
    return y + push(get())


def linear_transpose(get, x):
    return jax.linear_transpose(lambda v: v * get(), x)(x)[0]


def jvp_reads(get, x):
    @jax.custom_jvp
    def spike(v):
        return jnp.tanh(v - get())

    spike.defjvp(lambda p, t: (spike(*p), t[0] * (1 - spike(*p) ** 2)))
    return spike(x) * get()


def jvp_in_jit(get, x):
    return jax.jit(lambda x: jvp_reads(get, x))(x)


def jvp_in_scan(get, x):
    return jax.lax.scan(lambda c, _: (jvp_reads(get, c), None), x, length=2)[0]


def jvp_argument(get, x):
    @jax.custom_jvp
    def double(v):
        return 2 * v

    double.defjvps(lambda t, _, v: 2 * t)
    return double(x * get())


def vjp_reads(get, x):
    @jax.custom_vjp
    def scale(v):
        return v * get()

    scale.defvjp(lambda v: (v * get(), v), lambda v, ct: (ct * get(),))
    return scale(x)


def vjp_in_jit(get, x):
    return jax.jit(lambda x: vjp_reads(get, x))(x)


def custom_gradient(get, x):
    @jax.custom_gradient
    def scale(v):
        return v * get(), lambda ct: ct * get()

    return scale(x)


def closure_convert(get, x):
    func, consts = jax.closure_convert(lambda v: jnp.sin(v) * get(), x)
    return func(x, *consts)


def linear_solve(get, x):
    return jax.lax.custom_linear_solve(
        lambda v: (get() + 3) * v, x, lambda mv, b: b / mv(jnp.ones_like(b)), symmetric=True
    )


def root(get, x):
    def solve(g, y):
        return jax.lax.fori_loop(0, 30, lambda _, y: y - g(y) / (3 * y**2 + 1e-6), y)

    func = lambda y: y**3 - (jnp.abs(get()) + 1) * x
    return jax.lax.custom_root(func, x, solve, lambda g, y: y / g(jnp.ones_like(y)))


def equinox_while(get, x, kind):
    return eqxi.while_loop(
        lambda c: c[0] < 3,
        lambda c: (c[0] + 1, jnp.sin(c[1]) * get()),
        (0, x),
        kind=kind,
        max_steps=4,
    )[1]


def while_in_jvp(get, x):
    return equinox_while(get, x, "checkpointed")


def bounded_while(get, x):
    return equinox_while(get, x, "bounded")


def filter_custom_vjp(get, x):
    @eqx.filter_custom_vjp
    def scale(v):
        return v * get()

    scale.def_fwd(lambda perturbed, v: (v * get(), v))
    scale.def_bwd(lambda v, ct, perturbed, _: ct * get())
    return scale(x)


def shard_map(get, x):
    mesh = jax.make_mesh((1,), ("i",))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(lambda x: x * get(), mesh=mesh, in_specs=spec, out_specs=spec)(x)


def debugged(get, x):
    jax.debug.callback(lambda _: None, get())
    return jax.jit(lambda x: x * get())(x)


def nested(get, x):
    return vg.vector_grad(lambda x: jnp.sin(x) * get())(x)


def nested_in_scan(get, x):
    body = lambda c, _: (vg.vector_grad(lambda c: jnp.sin(c) * get())(c), None)
    return jax.lax.scan(body, x, length=2)[0]


def ode(get, x, **options):
    dfx = pytest.importorskip("diffrax")
    term = dfx.ODETerm(lambda t, y, args: -y * get() ** 2)
    options = {name: make(dfx) for name, make in options.items()}
    return dfx.diffeqsolve(term, dfx.Euler(), 0.0, 1.0, 0.25, x, max_steps=8, **options).ys[-1]


def function_operator(get, x):
    lx = pytest.importorskip("lineax")
    operator = lx.FunctionLinearOperator(lambda v: v * (get() + 3), jax.typeof(x))
    return lx.linear_solve(operator, x).value


def cg_operator(get, x):
    lx = pytest.importorskip("lineax")
    tag = lx.positive_semidefinite_tag
    operator = lx.FunctionLinearOperator(lambda v: v * (get() ** 2 + 3), jax.typeof(x), tag)
    return lx.linear_solve(operator, x, lx.CG(1e-6, 1e-6)).value


def jacobian_operator(get, x):
    lx = pytest.importorskip("lineax")
    operator = lx.JacobianLinearOperator(lambda v, _: v * (get() + 3), x)
    return lx.linear_solve(operator, x).value


def newton(get, x):
    optx = pytest.importorskip("optimistix")
    func = lambda y, _: y**3 - (jnp.abs(get()) + 1) * x
    return optx.root_find(func, optx.Newton(1e-6, 1e-6), x, throw=False).value


def fixed_point(get, x):
    optx = pytest.importorskip("optimistix")
    func = lambda y, _: 0.3 * jnp.sin(y) * get() + x
    solver = optx.FixedPointIteration(1e-6, 1e-6)
    return optx.fixed_point(func, solver, x, throw=False, max_steps=64).value


def simple(wrap):
    return lambda get, x: wrap(lambda x: jnp.sin(x) * get())(x)


policy = jax.checkpoint_policies.dots_saveable
CONSTRUCTS = {
    "plain": simple(lambda func: func),
    "jit": simple(jax.jit),
    "nested jit": simple(lambda func: jax.jit(jax.jit(func))),
    "inlined jit": simple(lambda func: jax.jit(func, inline=True)),
    "checkpoint": simple(jax.checkpoint),
    "checkpoint with a policy": simple(lambda func: jax.checkpoint(func, policy=policy)),
    "jit in checkpoint": simple(lambda func: jax.checkpoint(jax.jit(func))),
    "checkpoint in jit": simple(lambda func: jax.jit(jax.checkpoint(func))),
    "named call": simple(lambda func: jax.named_call(func, name="helper")),
    "fori_loop": lambda get, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) * get(), x),
    "map": lambda get, x: jax.lax.map(lambda y: jnp.sum(y * get()), x),
    "vmap": lambda get, x: jax.vmap(lambda y: jnp.sum(jnp.sin(y * get())))(x),
    "vmap of scan": lambda get, x: jax.vmap(lambda y: scan(get, y * get()))(x)[0],
    "vmap of jit": lambda get, x: jax.vmap(jax.jit(lambda y, i: y * get()[i]))(
        x, jnp.arange(3)
    ),
    "vmap out": lambda get, x: jax.vmap(lambda y: get(), out_axes=1)(x)[:, 0] * x,
    "inner jacfwd": lambda get, x: jax.jacfwd(lambda x: jnp.sin(x) * get())(x).sum(0),
    "inner jacrev": lambda get, x: jax.jacrev(lambda x: jnp.sin(x) * get())(x).sum(0),
    "inner hessian": lambda get, x: jax.hessian(lambda x: jnp.sum(x**3 * get()))(x).sum(0),
    "fft": lambda get, x: jnp.abs(jnp.fft.fft(x * get())),
    "solve": lambda get, x: jnp.linalg.solve(jnp.diag(get() + 3), x),
    "cg": lambda get, x: jax.scipy.sparse.linalg.cg(lambda v: v * (get() ** 2 + 2), x)[0],
    # To the last digit, or the check of `elementwise_grad` sees the tolerance of the solver.
    "gmres": lambda get, x: jax.scipy.sparse.linalg.gmres(
        lambda v: v * (get() + 3), x, tol=1e-7
    )[0],
    "returned by jit": lambda get, x: jax.jit(lambda: get())() * x,
    "where": lambda get, x: jnp.where(get() > 0, x * get(), get()),
    "filter_jit": simple(eqx.filter_jit),
    "vg.jit": simple(vg.jit),
    "filter_checkpoint": simple(eqx.filter_checkpoint),
    "filter_vmap": lambda get, x: eqx.filter_vmap(lambda y: jnp.sum(y * get()))(x),
    "filter_closure_convert": lambda get, x: eqx.filter_closure_convert(lambda v: v * get(), x)(
        x
    ),
    "diffrax": ode,
    "diffrax direct": lambda get, x: ode(get, x, adjoint=lambda dfx: dfx.DirectAdjoint()),
    "diffrax backsolve": lambda get, x: ode(get, x, adjoint=lambda dfx: dfx.BacksolveAdjoint()),
}
CONSTRUCTS |= {
    func.__name__: func
    for func in [
        scan,
        scan_over,
        reverse_scan,
        cond,
        switch,
        checkpointed_scan,
        jitted_in_scan,
        twice_jitted,
        associative_scan,
        inner_grad,
        inner_jvp,
        inner_vjp,
        linearize,
        linear_transpose,
        jvp_reads,
        jvp_in_jit,
        jvp_in_scan,
        jvp_argument,
        vjp_reads,
        vjp_in_jit,
        custom_gradient,
        closure_convert,
        linear_solve,
        root,
        while_in_jvp,
        bounded_while,
        filter_custom_vjp,
        shard_map,
        debugged,
        nested,
        nested_in_scan,
        function_operator,
        cg_operator,
        jacobian_operator,
        newton,
        fixed_point,
    ]
}

# A rule that is the user's own reads the state where no gradient follows.
REFUSED = {
    "jvp_reads",
    "jvp_in_jit",
    "jvp_in_scan",
    "vjp_reads",
    "vjp_in_jit",
    "custom_gradient",
    "filter_custom_vjp",
    "shard_map",
    "diffrax backsolve",
}
ROLES = ["differentiated", "bystander", "set", "both"]
PLACES = ["local", "global", "field", "default"]
WAYS = ["eager", "jit", "vg.jit", "scan"]

here: dict[str, vg.State] = {}  # of the global variable


class Holder(eqx.Module):
    state: vg.State

    def get(self):
        return self.state.value


def place_local(state):
    return lambda: state.value


def place_global(state):
    here["state"] = state
    return lambda: here["state"].value


def place_default(state):
    return lambda state=state: state.value


GETTERS = {
    "local": place_local,
    "global": place_global,
    "field": lambda state: Holder(state).get,
    "default": place_default,
}


def run(call, way):
    if way == "eager":
        return call()
    if way != "scan":
        return (jax.jit if way == "jit" else vg.jit)(lambda: call())()
    return jax.tree.map(
        lambda leaf: leaf[-1], jax.lax.scan(lambda c, _: (c, call()), 0, length=2)[1]
    )


def differentiate(func, *args):
    y, pull = jax.vjp(func, *args)
    return pull(jnp.ones_like(y))


def total(func):
    return lambda *args: jnp.sum(func(*args))


def by_all(transform):
    """A transform of JAX, by all arguments."""
    return lambda func, *args: transform(func, argnums=tuple(range(len(args))))(*args)


def take_own_blocks(func, *args):
    """Ours leaves out the derivatives by both a state and an argument."""
    return [row[i] for i, row in enumerate(by_all(jax.hessian)(func, *args))]


def take_diagonal(func, *args):
    blocks = by_all(jax.jacrev)(func, *args)
    if any(bool(jnp.any(block * (1 - jnp.eye(3)))) for block in blocks):
        raise ValueError("not elementwise")
    return [jnp.diagonal(block) for block in blocks]


def train(func, state):
    def call(x):
        step = vg.train_step(total(func), optax.sgd(1.0), state)
        before = state.value
        training, _ = step(step.init(), x)
        training.sync()
        after, state.value = state.value, before
        return before - after

    return call


# Ours, JAX's, and what both are of.
OPERATORS = {
    "vector_grad": (vg.vector_grad, differentiate, lambda func: func),
    "grad": (vg.grad, by_all(jax.grad), total),
    "jacrev": (vg.jacrev, by_all(jax.jacrev), lambda func: func),
    "jacfwd": (vg.jacfwd, by_all(jax.jacfwd), lambda func: func),
    "hessian": (vg.hessian, take_own_blocks, total),
    "elementwise_grad": (vg.elementwise_grad, take_diagonal, lambda func: func),
    "train_step": (train, by_all(jax.grad), total),
}


def catch(call):
    try:
        return call(), None
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return None, error


@functools.lru_cache(maxsize=64)
def call_by_jax(name, role, operator):
    """The function of arrays, which is the same from each place and in each way."""
    func, (_, by_jax, wrap) = CONSTRUCTS[name], OPERATORS[operator]

    def set_before(x):
        w = jnp.cos(x)
        return func(lambda: w, x)

    func_of_arrays, *args = {
        "set": (set_before, X),
        "both": (lambda w, x: func(lambda: w, x), W, X),
        "differentiated": (lambda w: func(lambda: w, X), W),
        "bystander": (lambda x: func(lambda: W, x), X),
    }[role]
    return catch(lambda: by_jax(wrap(func_of_arrays), *args))


def check(name, role, place, way, operator):
    func, state = CONSTRUCTS[name], vg.State(W, name=NAME)
    get, other = GETTERS[place](state), vg.State(X)
    ours, _, wrap = OPERATORS[operator]

    def set_before(x):
        state.value = jnp.cos(x)
        return func(get, x)

    call = {
        "set": lambda: ours(wrap(set_before))(X),
        "both": lambda: ours(wrap(lambda x: func(get, x)), state, argnums=0)(X),
        "differentiated": lambda: ours(wrap(lambda x: func(get, x)), state)(X),
        "bystander": lambda: ours(wrap(lambda *_: func(get, other.value)), other)(X),
    }[role]
    got, error = catch(lambda: run(call, way))
    if error is None or NAME not in str(error) or "must be elementwise" in str(error):
        expected, error_by_hand = call_by_jax(name, role, operator)
        assert (error is None) == (error_by_hand is None), error or error_by_hand
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        for ours_now, by_hand in pairs:
            np.testing.assert_allclose(ours_now, by_hand, 2e-3, 1e-4)
    else:
        assert name in REFUSED, error
        assert re.search("argument|close over", str(error))
    # The state is as after the function of arrays, or as it was.
    last = [W, jnp.cos(X)] if role == "set" else [W]
    assert any(np.allclose(state.value, each, atol=1e-6) for each in last)


def list_cells():
    """Of each construct, one cell of the sample."""
    others = sorted(OPERATORS.keys() - {"vector_grad"})
    for i, name in enumerate(sorted(CONSTRUCTS)):
        operator = others[i // 2 % 6] if i % 2 else "vector_grad"
        sample = (ROLES[i // 3 % 4], PLACES[i // 2 % 4], WAYS[(i + i // 4) % 4], operator)
        cells = set(itertools.product(ROLES, PLACES, WAYS, ["vector_grad"]))
        for j, k in itertools.product(range(4), range(6)):
            cells.add((ROLES[j], PLACES[(i + k) % 4], WAYS[(i + j + k) % 4], others[k]))
        sample, *cells = [restrict(*cell) for cell in (sample, *sorted(cells))]
        yield pytest.param(name, *sample)
        for cell in sorted({*cells} - {sample}):
            yield pytest.param(name, *cell, marks=pytest.mark.nightly)


def restrict(role, place, way, operator):
    """A training step is compiled by itself, and over states alone.

    What is not elementwise fails at run time, and under `jax.jit` the state is lost then.
    """
    if operator == "train_step":
        role, way = role if role == "bystander" else "differentiated", "eager"
    if operator == "elementwise_grad":
        way = "eager" if way in ("eager", "scan") else "vg.jit"
    return role, place, way, operator


@pytest.mark.parametrize(("name", "role", "place", "way", "operator"), list(list_cells()))
def test_each_cell_is_right_or_a_clear_error(name, role, place, way, operator):
    check(name, role, place, way, operator)

"""The papers' expressivity proofs as explicit weights: written down, run, and checked against brute force.

One module a construction, each with `describe()` (mask, attention, norm, precision, idea), `size(...)`, `build(...)`,
`worst_case(...)` (an instance that one loop fewer gets wrong) and `verify(...)`, which returns a `Report`:

    reachability       graph reachability in ceil(log2 D) + 1 loops          Ouro, theorem 1
    composition        a product of n group elements in ceil(log2 n) loops   Saunshi et al., theorem 5.1
    distinct_layers    L layers, R of them distinct, as one layer looped     Saunshi et al., theorem 5.2
    hops               p-hop induction in floor(log2 p) + 2 loops            Saunshi et al., corollary 5.3
    chain_of_thought   m steps of chain of thought in m loops                Saunshi et al., theorem 5.4
"""

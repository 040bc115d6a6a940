"use strict";
// Formulas of sizes: sums of terms [coefficient, atom, ...] at given sizes of the symbols.

const Sizes = {};

Sizes.at = (terms, sizes) => {
  let total = 0;
  for (const [coefficient, ...atoms] of terms) {
    let product = coefficient;
    for (const atom of atoms) {
      product *= typeof atom === "string" ? sizes[atom] : Math.floor(Sizes.at(atom.of, sizes) / Sizes.at(atom.by, sizes));
    }
    total += product;
  }
  return total;
};

Sizes.text = (terms) =>
  terms
    .map(([coefficient, ...atoms]) => {
      const words = atoms.map((atom) => (typeof atom === "string" ? atom : `(${Sizes.text(atom.of)})//(${Sizes.text(atom.by)})`));
      return [...(coefficient === 1 && words.length ? [] : [T.count(coefficient)]), ...words].join("·");
    })
    .join(" + ") || "0";

Sizes.aligned = (bytes, unit) => Math.ceil(bytes / unit) * unit;

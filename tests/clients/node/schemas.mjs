// Random types as programs write them with zod 4, by a seed.
import { z } from "zod";

const NAMES = ["city", "unit", "limit", "tags", "user_id", "isActive", "when", "filters", "query", "ünit"];
const WORDS = ["red", "green", "metric", "a b", "é", 'q"'];

// mulberry32: the same types for the same seed anywhere.
export function generator(seed) {
  let state = Math.imul(seed + 1, 0x9e3779b9);
  const next = () => {
    state = (state + 0x6d2b79f5) | 0;
    let bits = Math.imul(state ^ (state >>> 15), 1 | state);
    bits = (bits + Math.imul(bits ^ (bits >>> 7), 61 | bits)) ^ bits;
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
  const below = (count) => Math.floor(next() * count);
  const sample = (items, count) => {
    const left = [...items];
    return Array.from({ length: count }, () => left.splice(below(left.length), 1)[0]);
  };
  return { below, pick: (items) => items[below(items.length)], sample };
}

export function randomObject(random, depth = 2) {
  const shape = {};
  for (const name of random.sample(NAMES, random.below(4) + (depth < 2 ? 1 : 0))) {
    const type = randomType(random, depth);
    const changes = [
      () => type,
      () => type.describe(`The ${name}.`),
      () => type.optional(),
      () => type.nullable(),
      () => type.nullish(),
      () => type.readonly(),
    ];
    shape[name] = random.pick(changes)();
  }
  const kinds = [z.object, z.object, z.strictObject, z.looseObject];
  return random.pick(kinds)(shape);
}

function randomType(random, depth) {
  const simple = [
    () => z.string(),
    () => z.string().min(1).max(1 + random.below(6)),
    () => z.string().regex(/^[A-Z]{2}-[0-9]{1,3}$/),
    () => z.string().startsWith("a").max(5),
    () => z.string().endsWith("z").max(5),
    () => z.cuid2(),
    () => z.base64(),
    () => z.iso.date(),
    () => z.iso.time(),
    () => z.iso.datetime(),
    () => z.uuid(),
    () => z.email(),
    () => z.ipv4(),
    () => z.number(),
    () => z.number().gt(0).lt(1 + random.below(9)),
    () => z.number().multipleOf(0.5).min(-2).max(2),
    () => z.int(),
    () => z.int().positive(),
    () => z.int32(),
    () => z.float32(),
    () => z.int().min(1).max(1 + random.below(100)),
    () => z.boolean(),
    () => z.boolean().default(false),
    () => z.null(),
    () => z.enum(random.sample(WORDS, 3)),
    () => z.literal(random.pick([...WORDS, 7, true])),
    () => z.templateLiteral(["v", z.int().min(0).max(9), ".", z.enum(["a", "b"])]),
  ];
  if (!depth) return random.pick(simple)();
  const inner = () => randomType(random, depth - 1);
  const nested = [
    () => z.array(inner()),
    () => z.array(inner()).min(1).max(2),
    () => z.tuple([inner(), z.int()]),
    () => z.record(z.string(), inner()),
    () => z.record(z.enum(["x", "y"]), inner()),
    () => z.partialRecord(z.enum(["x", "y"]), inner()),
    () => z.record(z.string().min(1).max(4), inner()),
    () => z.object({ city: inner() }).catchall(inner()),
    () => z.union([inner(), z.string().max(4)]),
    () => z.discriminatedUnion("kind", [
      z.object({ kind: z.literal("a"), value: inner() }),
      z.object({ kind: z.literal("b"), other: inner() }),
    ]),
    () => z.intersection(z.object({ left: inner() }), z.object({ right: inner() })),
    () => randomObject(random, depth - 1),
    () => randomObject(random, depth - 1),
    () => randomObject(random, depth - 1).partial(),
  ];
  return random.pick(random.below(2) ? simple : nested)();
}

// What a tool has as its parameters: as the SDKs make it, for what is read or for what is written, in two drafts.
export function parametersOf(random, type) {
  const target = random.pick(["draft-2020-12", "draft-7"]);
  return z.toJSONSchema(type, { io: random.pick(["input", "output"]), target });
}

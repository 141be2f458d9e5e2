// What every client asks for; the same as tests/clients/asked.py.
import { z } from "zod";

export const MODEL = "triad-5m";
export const SORT = "Put these in ascending order: jacket, hammer, pencil, door, shovel, umbrella";
export const SORTED = "1. door\n2. hammer\n3. jacket\n4. pencil\n5. shovel\n6. umbrella";
export const WEATHER = "How is the weather in Oslo?";
export const Report = z.object({
  sky: z.enum(["clear", "cloudy", "rain"]),
  wind: z.object({ strength: z.enum(["calm", "breeze", "storm"]), is_cold: z.boolean() }),
});
export const Asked = z.object({ unit: z.enum(["C", "F"]), days: z.int().min(1).max(7) });

export const server = process.env.TRIAD_CLIENTS_URL;
export const baseURL = `${server}/v1`;

export async function all(iterable) {
  const found = [];
  for await (const item of iterable) found.push(item);
  return found;
}

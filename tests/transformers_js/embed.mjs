// Embeds images and texts by an exported model: node embed.mjs FOLDER DTYPE REQUEST.json, with lists of `images` (paths)
// and `texts`. Prints JSON: what each tower and both together make of them.
import { readFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';

import {
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    RawImage,
    env,
} from '@huggingface/transformers';

const [folder, dtype, request] = process.argv.slice(2);
const { images, texts } = JSON.parse(readFileSync(request, 'utf8'));
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const name = basename(folder);

const tokenizer = await AutoTokenizer.from_pretrained(name);
const processor = await AutoProcessor.from_pretrained(name);
const tokens = tokenizer(texts, { padding: true, truncation: true });
const pixels = await processor(await Promise.all(images.map((path) => RawImage.read(path))));

const text = await CLIPTextModelWithProjection.from_pretrained(name, { dtype });
const vision = await CLIPVisionModelWithProjection.from_pretrained(name, { dtype });
const both = await CLIPModel.from_pretrained(name, { dtype });
const { text_embeds } = await text(tokens);
const { image_embeds } = await vision(pixels);
const { logits_per_image } = await both({ ...tokens, ...pixels });
const values = {
    input_ids: tokens.input_ids.tolist().map((row) => row.map(Number)),
    pixel_values: pixels.pixel_values.tolist(),
    text_embeds: text_embeds.tolist(),
    image_embeds: image_embeds.tolist(),
    logits_per_image: logits_per_image.tolist(),
};
process.stdout.write(JSON.stringify(values));

// Vercel's AI SDK: its provider for OpenAI-compatible servers, those of OpenAI's two APIs, and that of Anthropic's.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const settings = JSON.parse(process.env.CLIENT_SETTINGS);
const WRONG_KEY = "wrong";
// every value is bounded: the weights are random, and a string would never end
const shape = z.object({ colour: z.enum(["red", "green", "blue"]), large: z.boolean() });

const providers = {
  compatible: (apiKey) =>
    createOpenAICompatible({
      name: "dvd-serve",
      baseURL: `${settings.url}/v1`,
      apiKey,
      includeUsage: true,
      supportsStructuredOutputs: true,
    })(settings.model),
  chat: (apiKey) => createOpenAI({ baseURL: `${settings.url}/v1`, apiKey }).chat(settings.model),
  responses: (apiKey) => createOpenAI({ baseURL: `${settings.url}/v1`, apiKey }).responses(settings.model),
  messages: (apiKey) => createAnthropic({ baseURL: `${settings.url}/v1`, apiKey })(settings.model),
};

function request(model, image, options = {}) {
  const content = [
    { type: "file", mediaType: "image", data: new URL(image) },
    { type: "text", text: settings.question },
  ];
  const messages = [{ role: "user", content }];
  return { model, messages, temperature: 0, maxRetries: 0, maxOutputTokens: settings.answer_tokens, ...options };
}

function usageOf(usage) {
  return { input_tokens: usage.inputTokens, output_tokens: usage.outputTokens };
}

async function answer(model, image) {
  const result = await generateText(request(model, image));
  return { text: result.text, usage: usageOf(result.usage) };
}

async function stream(model) {
  const result = streamText(request(model, settings.image));
  const pieces = [];
  for await (const piece of result.textStream) pieces.push(piece);
  return { pieces, usage: usageOf(await result.usage) };
}

async function structured(model) {
  const output = Output.object({ schema: shape });
  return (await generateText(request(model, settings.image, { output, maxOutputTokens: 200 }))).output;
}

async function toolCall(model) {
  const options = { tools: { Shape: tool({ inputSchema: shape }) }, toolChoice: { type: "tool", toolName: "Shape" }, maxOutputTokens: 200 };
  const [call] = (await generateText(request(model, settings.image, options))).toolCalls;
  return { name: call.toolName, arguments: call.input };
}

async function errorOf(promise) {
  try {
    return { unexpected: await promise };
  } catch (error) {
    return { classes: [error.name], status: error.statusCode, message: error.message };
  }
}

const cases = {
  answer: (create) => answer(create(settings.key), settings.image),
  answer_to_url: (create) => answer(create(settings.key), settings.image_url),
  stream: (create) => stream(create(settings.key)),
  structured: (create) => structured(create(settings.key)),
  tool_call: (create) => toolCall(create(settings.key)),
  broken_image: (create) => errorOf(answer(create(settings.key), settings.broken_image)),
  wrong_key: (create) => errorOf(answer(create(WRONG_KEY), settings.image)),
};

const report = {};
for (const [provider, create] of Object.entries(providers)) {
  for (const [name, run] of Object.entries(cases)) {
    // the SDK fetches images for this provider itself, and none from this machine
    if (provider === "compatible" && name === "answer_to_url") continue;
    report[`${provider}.${name}`] = await run(create).catch((error) => ({ traceback: `${error.stack}` }));
  }
}
console.log(`\n${JSON.stringify(report)}`);

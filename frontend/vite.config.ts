import { defineConfig } from "vitest/config";

// Self-contained files with fixed names: Django's static files storage adds the hashes.
export default defineConfig({
  publicDir: false,
  build: {
    target: ["chrome123", "firefox120", "safari17.5"],
    outDir: "../streaming_chat/static/streaming_chat",
    emptyOutDir: true,
    modulePreload: false,
    rolldownOptions: {
      input: "src/index.ts",
      preserveEntrySignatures: "strict",
      output: {
        format: "es",
        entryFileNames: "streaming-chat.js",
        assetFileNames: "streaming-chat[extname]",
        codeSplitting: false,
      },
    },
  },
  test: { environment: "jsdom", include: ["tests/**/*.test.ts"], restoreMocks: true },
});

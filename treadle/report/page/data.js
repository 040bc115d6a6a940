"use strict";
// Sections of data: base64 of gzip of JSON. Each is read when it is first used.

const Data = { held: new Map() };

Data.text = (name) => {
  const element = document.querySelector(`script[data-section="${CSS.escape(name)}"]`);
  return element ? element.textContent : null;
};

Data.bytes = (text) => {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) bytes[at] = raw.charCodeAt(at);
  return bytes;
};

Data.read = async (name) => {
  const text = Data.text(name);
  if (text === null) return null;
  try {
    const stream = new Blob([Data.bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return await new Response(stream).json();
  } catch (error) {
    throw new Error(`The data of this part of the report is damaged (${name}): ${error.message}`);
  }
};

/** Return a promise of a section; null if the report has no section of that name. */
Data.section = (name) => {
  if (!Data.held.has(name)) Data.held.set(name, Data.read(name));
  return Data.held.get(name);
};

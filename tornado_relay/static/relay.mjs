import "./relay.js"

export const RelaySource = globalThis.RelaySource
export default RelaySource

//! The channel's state machine, compiled from the agent's own sources: the agent shows it to nobody, and
//! opening it for this crate would make it part of what the library promises.

#![allow(dead_code, unreachable_pub, reason = "the agent's drivers use what is not used here")]

#[path = "../agent/src/engine/channel.rs"]
pub(crate) mod channel;
#[path = "../agent/src/engine/chunks.rs"]
mod chunks;
#[path = "../agent/src/engine/stream.rs"]
mod stream;

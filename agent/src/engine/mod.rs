//! The protocol as a function of bytes, events and time: no socket, no task, no clock.
//!
//! [`channel`] is the state machine of one conversation between a reacher and an exposer;
//! [`backoff`] says when to try again, [`surroundings`] when at once, [`tampering`] when altered packets
//! are to be reported. The drivers in `io` feed them.

pub(crate) mod backoff;
pub(crate) mod channel;
pub(crate) mod freshness;
mod stream;
pub(crate) mod surroundings;
pub(crate) mod tampering;

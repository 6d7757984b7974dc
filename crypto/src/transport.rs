//! Sealing and opening records under the keys of a finished handshake. PROTOCOL.md, "Records".
//!
//! The two directions have their own counters and share one snow state, whose ciphers are used by
//! reference only. Keys are wiped when both directions are dropped, which is what a rekey does: it
//! puts the halves of another [`Transport`] in their place.

use std::sync::Arc;

use connect_spec::limits::{MAX_NOISE_BYTES, MAX_RECORD_BYTES, TAG_BYTES};
use snow::{HandshakeState, StatelessTransportState};

use crate::secret::redacted;

/// The keys of a finished handshake.
pub struct Transport {
    keys: Arc<StatelessTransportState>,
    handshake_hash: [u8; 32],
}

impl Transport {
    pub(crate) fn new(noise: HandshakeState) -> Self {
        let mut handshake_hash = [0; 32];
        handshake_hash.copy_from_slice(noise.get_handshake_hash());
        let keys =
            noise.into_stateless_transport_mode().expect("called after the second of two messages");
        Self { keys: Arc::new(keys), handshake_hash }
    }

    /// Hash of everything that both ends saw: equal on both, and on no other tunnel. Not a secret.
    #[must_use]
    pub fn handshake_hash(&self) -> [u8; 32] {
        self.handshake_hash
    }

    /// The two directions, which may go to different owners.
    #[must_use]
    pub fn split(self) -> (Sealer, Opener) {
        let opener = Opener { keys: Some(Arc::clone(&self.keys)), counter: 0 };
        (Sealer { keys: self.keys, counter: 0 }, opener)
    }
}

/// Why a record could not be sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// More bytes than one record holds.
    #[error("a record holds at most {MAX_RECORD_BYTES} bytes")]
    TooLong,
    /// Every counter of this key is used.
    #[error("the key of this tunnel is used up")]
    Exhausted,
    /// The record does not open: changed, replayed, reordered, or of another tunnel.
    #[error("record does not open")]
    Open,
}

/// Seals the records of one direction, each under the next counter.
pub struct Sealer {
    keys: Arc<StatelessTransportState>,
    counter: u64,
}

impl Sealer {
    /// Seals `plaintext` into `out`, which is replaced and whose memory is used again.
    ///
    /// # Errors
    /// [`TransportError::TooLong`]; [`TransportError::Exhausted`] when the key is used up: the counter
    /// never wraps. In both cases nothing was sealed and `out` is empty.
    pub fn seal(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), TransportError> {
        if plaintext.len() > MAX_RECORD_BYTES {
            out.clear();
            return Err(TransportError::TooLong);
        }
        out.resize(plaintext.len() + TAG_BYTES, 0);
        // snow refuses the last counter, which Noise reserves (section 5.1), and nothing else here.
        if self.keys.write_message(self.counter, plaintext, out).is_err() {
            out.clear();
            return Err(TransportError::Exhausted);
        }
        self.counter += 1;
        Ok(())
    }

    /// How many records were sealed: a driver rekeys long before the counter ends.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.counter
    }
}

/// Opens the records of one direction, each under the next counter.
pub struct Opener {
    /// None once a record did not open.
    keys: Option<Arc<StatelessTransportState>>,
    counter: u64,
}

impl Opener {
    /// Opens `record` into `out`, which is replaced and whose memory is used again.
    ///
    /// # Errors
    /// [`TransportError::Open`], whatever the cause, for this record and for every later one: the
    /// tunnel is over. `out` is empty then.
    pub fn open(&mut self, record: &[u8], out: &mut Vec<u8>) -> Result<(), TransportError> {
        let opened = self.try_open(record, out);
        if opened.is_none() {
            self.keys = None;
            out.clear();
        }
        opened.ok_or(TransportError::Open)
    }

    fn try_open(&mut self, record: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let keys = self.keys.as_ref()?;
        if record.len() > MAX_NOISE_BYTES {
            return None;
        }
        out.resize(record.len().checked_sub(TAG_BYTES)?, 0);
        keys.read_message(self.counter, record, out).ok()?;
        self.counter += 1;
        Some(())
    }

    /// How many records were opened.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.counter
    }
}

redacted!(Transport, Sealer, Opener);

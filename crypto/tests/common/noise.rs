//! Noise (revision 34, section 5.2) and the key derivation written once more, from the specification: what a
//! peer does that keeps every rule of the cipher and none of ours.

#![allow(dead_code, unreachable_pub, reason = "not everybody uses all of it")]

use blake2::{Blake2s256, Digest as _};
use chacha20poly1305::{
    ChaCha20Poly1305, KeyInit as _,
    aead::{Aead as _, Payload},
};
use x25519_dalek::{PublicKey, StaticSecret};

const PROTOCOL: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";

fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Blake2s256::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize().into()
}

/// HMAC (RFC 2104) with BLAKE2s.
fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let pad = |byte: u8| {
        let mut block = [byte; 64];
        block.iter_mut().zip(key).for_each(|(block, key)| *block ^= key);
        block
    };
    let inner = hash(&[&pad(0x36)[..], &parts.concat()]);
    hash(&[&pad(0x5c), &inner])
}

/// `KDF(key, label)` of PROTOCOL.md.
pub fn kdf(key: &[u8; 32], label: &[u8]) -> [u8; 32] {
    hmac(key, &[b"connect/v1 ", label])
}

/// X25519.
pub fn dh(secret: &[u8; 32], public: &[u8; 32]) -> [u8; 32] {
    StaticSecret::from(*secret).diffie_hellman(&PublicKey::from(*public)).to_bytes()
}

/// The public key of a secret.
pub fn public(secret: &[u8; 32]) -> [u8; 32] {
    PublicKey::from(&StaticSecret::from(*secret)).to_bytes()
}

/// A `SymmetricState` whose keys are each used for one message.
#[derive(Clone)]
pub struct Symmetric {
    chaining_key: [u8; 32],
    hash: [u8; 32],
    key: [u8; 32],
}

impl Symmetric {
    /// Begins a handshake with a responder whose static key is known.
    pub fn new(prologue: &[u8], responder_static: &[u8; 32]) -> Self {
        let name = hash(&[PROTOCOL]);
        let mut state = Self { chaining_key: name, hash: name, key: [0; 32] };
        state.mix_hash(prologue);
        state.mix_hash(responder_static);
        state
    }

    pub fn mix_hash(&mut self, bytes: &[u8]) {
        self.hash = hash(&[&self.hash, bytes]);
    }

    pub fn mix_key(&mut self, input: &[u8; 32]) {
        let temporary = hmac(&self.chaining_key, &[input]);
        self.chaining_key = hmac(&temporary, &[&[1]]);
        self.key = hmac(&temporary, &[&self.chaining_key, &[2]]);
    }

    pub fn mix_key_and_hash(&mut self, input: &[u8; 32]) {
        let temporary = hmac(&self.chaining_key, &[input]);
        self.chaining_key = hmac(&temporary, &[&[1]]);
        let mixed = hmac(&temporary, &[&self.chaining_key, &[2]]);
        self.key = hmac(&temporary, &[&mixed, &[3]]);
        self.mix_hash(&mixed);
    }

    /// The token `e`, with which a handshake that has a psk also mixes a key.
    pub fn ephemeral(&mut self, public: &[u8; 32]) {
        self.mix_hash(public);
        self.mix_key(public);
    }

    /// The keys of both directions, the initiator's first.
    pub fn split(&self) -> [[u8; 32]; 2] {
        let temporary = hmac(&self.chaining_key, &[]);
        let first = hmac(&temporary, &[&[1]]);
        [first, hmac(&temporary, &[&first, &[2]])]
    }

    pub fn encrypt_and_hash(&mut self, plaintext: &[u8]) -> Vec<u8> {
        let payload = Payload { msg: plaintext, aad: &self.hash };
        let cipher = ChaCha20Poly1305::new(&self.key.into());
        let ciphertext = cipher.encrypt(&[0; 12].into(), payload).expect("a short message");
        self.mix_hash(&ciphertext);
        ciphertext
    }
}

/// A public key, and what the other end shares with it.
#[derive(Clone, Copy)]
pub struct Shared {
    pub public: [u8; 32],
    pub secret: [u8; 32],
}

impl Shared {
    /// By somebody who has the secret of the key.
    pub fn of(secret: &[u8; 32], other: &[u8; 32]) -> Self {
        Self { public: public(secret), secret: dh(secret, other) }
    }
}

/// The state after `e, es, s, ss`, and what was sent by then.
pub fn after_static_keys(
    prologue: &[u8],
    responder: &[u8; 32],
    ephemeral: &Shared,
    initiator: &Shared,
) -> (Vec<u8>, Symmetric) {
    let mut state = Symmetric::new(prologue, responder);
    let mut sent = ephemeral.public.to_vec();
    state.ephemeral(&ephemeral.public);
    state.mix_key(&ephemeral.secret);
    sent.extend(state.encrypt_and_hash(&initiator.public));
    state.mix_key(&initiator.secret);
    (sent, state)
}

/// Takes the state after message 1 on to `e, ee, se, psk`.
pub fn answer(
    state: &mut Symmetric,
    ephemeral: &[u8; 32],
    [with_ephemeral, with_static]: [&[u8; 32]; 2],
    psk: &[u8; 32],
) {
    state.ephemeral(ephemeral);
    state.mix_key(with_ephemeral);
    state.mix_key(with_static);
    state.mix_key_and_hash(psk);
}

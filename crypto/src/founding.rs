//! How a workspace begins. PROTOCOL.md, "Identity".
//!
//! Certificates, credentials and NoiseKeys are plain objects: fill one in and
//! [`SigningKey::sign`] it. Only the genesis has rules that tie several secrets together.

use connect_spec::{
    objects::{Founder, Genesis, SUITE_1, SignerRole},
    signed::Signed,
};
use rand_core::CryptoRng;

use crate::{
    epoch::EpochSecrets,
    keys::{RecoveryKey, SigningKey},
};

/// A workspace just made, with every secret that its founder holds.
#[derive(Debug)]
pub struct Founding {
    /// The genesis; its hash is the workspace id.
    pub genesis: Signed<Genesis>,
    /// The first signer, an owner.
    pub signer: SigningKey,
    /// To be shown to people once, as words, and then forgotten.
    pub recovery: RecoveryKey,
    /// The secrets of epoch 0.
    pub epoch: EpochSecrets,
}

impl Founding {
    /// Makes a workspace with one owner.
    #[must_use]
    pub fn create(rng: &mut impl CryptoRng) -> Self {
        let signer = SigningKey::generate(rng);
        let recovery = RecoveryKey::generate(rng);
        let epoch = EpochSecrets::generate(rng);
        let mut salt = [0; 16];
        rng.fill_bytes(&mut salt);
        let genesis = signer.sign(&Genesis {
            suite: SUITE_1,
            salt,
            founders: vec![Founder { key: signer.public(), role: SignerRole::Owner }],
            recovery_key: recovery.public(),
            epoch_commit: epoch.commit(),
        });
        Self { genesis, signer, recovery, epoch }
    }
}

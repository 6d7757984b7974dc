//! Who is a member: the trust state that starts from the genesis, and the judgement of a peer.
//!
//! Everything here is a function of signed objects and of a time that the caller passes in; the hub
//! runs it as a second lock, the agents as the first. PROTOCOL.md, "Verifying a peer".

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    bytes::hex_newtype,
    ids::{AgentId, CredentialId, ServiceId, WorkspaceId},
    keys::{IdentityKey, StaticPublicKey},
    limits::CLOCK_TOLERANCE,
    objects::{
        AgentRole, Certificate, Credential, CredentialKind, Genesis, Issuer, NoiseKey, SignerRole,
        UnixTime,
    },
    signed::Signed,
};

hex_newtype!(
    /// Hash of an entry of the trust log; that of entry 0 is the workspace id.
    EntryHash,
    32
);

/// A place in the trust log: how many entries follow the genesis, and the hash of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Number of the last entry; the genesis is 0.
    pub seq: u64,
    /// Its hash.
    pub hash: EntryHash,
}

impl Head {
    /// The head of a log that holds the genesis alone.
    #[must_use]
    pub fn genesis(workspace: WorkspaceId) -> Self {
        Self { seq: 0, hash: EntryHash(workspace.0) }
    }
}

/// Why a genesis or a peer is not trusted. All are trust violations; none is repaired by trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The genesis does not hash to the workspace id, or a founder did not sign it.
    #[error("the genesis is not the one that the workspace id names")]
    Genesis,
    /// An object is for another workspace.
    #[error("an object belongs to another workspace")]
    Workspace,
    /// The identity key does not give the agent id that was named.
    #[error("the certificate is not that of the agent that was named")]
    Agent,
    /// The NoiseKey is not signed by the identity key, or is for another agent.
    #[error("the static key is not bound to the agent's identity")]
    NoiseKey,
    /// The issuer is neither a signer at this head nor the credential presented.
    #[error("the certificate's issuer is unknown")]
    IssuerUnknown,
    /// The credential does not hold: its issuer is no signer, or its signature is wrong.
    #[error("the credential is not signed by a signer of the workspace")]
    Credential,
    /// The certificate's signature does not hold.
    #[error("the certificate is not signed by its issuer")]
    Certificate,
    /// Role, tags or services differ from what the credential grants.
    #[error("the certificate claims more than its credential grants")]
    Exceeds,
    /// The certificate or its credential ended.
    #[error("the certificate has expired")]
    Expired,
}

/// What an agent shows of itself: in a login, in a service record and in the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presented {
    /// Certifies the identity key.
    pub certificate: Signed<Certificate>,
    /// The credential under which the certificate was made, if one was.
    pub credential: Option<Signed<Credential>>,
    /// Binds the static key to the identity key.
    pub noise_key: Signed<NoiseKey>,
}

/// Proof that [`TrustState::verify_peer`] accepted a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedPeer {
    agent_id: AgentId,
    presented: Presented,
}

impl VerifiedPeer {
    /// The peer's id.
    #[must_use]
    pub fn agent_id(&self) -> AgentId {
        self.agent_id
    }

    /// The peer's identity key.
    #[must_use]
    pub fn identity_key(&self) -> IdentityKey {
        self.certificate().identity_key
    }

    /// The key that its Noise handshake must use.
    #[must_use]
    pub fn static_key(&self) -> StaticPublicKey {
        self.presented.noise_key.object().static_key
    }

    /// The counter of that key.
    #[must_use]
    pub fn noise_key_counter(&self) -> u64 {
        self.presented.noise_key.object().counter
    }

    /// The certificate, verified.
    #[must_use]
    pub fn certificate(&self) -> &Certificate {
        self.presented.certificate.object()
    }

    /// Everything that was presented, verified.
    #[must_use]
    pub fn presented(&self) -> &Presented {
        &self.presented
    }

    /// The credential by which the peer joined, if it did not get its certificate from a signer.
    #[must_use]
    pub fn credential_id(&self) -> Option<CredentialId> {
        self.presented.credential.as_ref().map(|credential| credential.object().id())
    }

    /// The services that a guest may reach; `None` for members.
    #[must_use]
    pub fn services(&self) -> Option<&[ServiceId]> {
        self.certificate().services.as_deref()
    }
}

/// What the trust log says at one head. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustState {
    workspace_id: WorkspaceId,
    head: Head,
    signers: BTreeMap<IdentityKey, SignerRole>,
    epoch_commit: [u8; 32],
}

impl TrustState {
    /// Starts from the genesis that `anchor` names.
    ///
    /// # Errors
    /// [`TrustError::Genesis`] when it hashes to another id, or when a founder did not sign it.
    ///
    /// # Security
    /// `anchor` must come from an invite or from this agent's own disk, never from the hub.
    pub fn from_genesis(
        anchor: WorkspaceId,
        genesis: &Signed<Genesis>,
    ) -> Result<Self, TrustError> {
        let founders = &genesis.object().founders;
        let signed_by_all = founders.len() == genesis.signatures().len()
            && founders.iter().zip(genesis.signatures()).all(|(f, (key, _))| f.key == *key);
        if genesis.hash() != anchor.0 || !signed_by_all || genesis.verify_all().is_err() {
            return Err(TrustError::Genesis);
        }
        Ok(Self {
            workspace_id: anchor,
            head: Head::genesis(anchor),
            signers: founders.iter().map(|founder| (founder.key, founder.role)).collect(),
            epoch_commit: genesis.object().epoch_commit,
        })
    }

    /// The workspace.
    #[must_use]
    pub fn workspace_id(&self) -> WorkspaceId {
        self.workspace_id
    }

    /// The place in the log that this state describes.
    #[must_use]
    pub fn head(&self) -> Head {
        self.head
    }

    /// `H("epoch", M || W)` of the current epoch.
    #[must_use]
    pub fn epoch_commit(&self) -> &[u8; 32] {
        &self.epoch_commit
    }

    /// Whether `key` is a signer at this head.
    #[must_use]
    pub fn is_signer(&self, key: &IdentityKey) -> bool {
        self.signers.contains_key(key)
    }

    /// Verifies a credential by itself: for this workspace, issued by a signer at this head.
    ///
    /// # Errors
    /// [`TrustError::Workspace`], [`TrustError::Credential`].
    pub fn verify_credential(&self, credential: &Signed<Credential>) -> Result<(), TrustError> {
        let issuer = &credential.object().issuer;
        if credential.object().workspace_id != self.workspace_id {
            return Err(TrustError::Workspace);
        }
        if !self.is_signer(issuer) || credential.verify_by(issuer).is_err() {
            return Err(TrustError::Credential);
        }
        Ok(())
    }

    /// Judges what a peer presents: steps 1 to 7 of PROTOCOL.md, "Verifying a peer", but for the
    /// NoiseKey counter (step 3, which needs the reader's memory) and the tags (step 6, which
    /// travel inside the handshake).
    ///
    /// `expected` is the agent that the prologue, the hub or the record named.
    ///
    /// # Errors
    /// [`TrustError`]: the first rule that is broken.
    pub fn verify_peer(
        &self,
        expected: AgentId,
        presented: Presented,
        now: UnixTime,
    ) -> Result<VerifiedPeer, TrustError> {
        let certificate = presented.certificate.object();
        let noise_key = presented.noise_key.object();
        if certificate.workspace_id != self.workspace_id
            || noise_key.workspace_id != self.workspace_id
        {
            return Err(TrustError::Workspace);
        }
        if certificate.agent_id() != expected {
            return Err(TrustError::Agent);
        }
        if noise_key.agent_id != expected
            || presented.noise_key.verify_by(&certificate.identity_key).is_err()
        {
            return Err(TrustError::NoiseKey);
        }
        match certificate.issuer {
            Issuer::Signer(issuer) => {
                // A credential beside a signer's certificate would be an unverified passenger.
                if !self.is_signer(&issuer) || presented.credential.is_some() {
                    return Err(TrustError::IssuerUnknown);
                }
                if presented.certificate.verify_by(&issuer).is_err() {
                    return Err(TrustError::Certificate);
                }
                if certificate.role == AgentRole::Guest || certificate.services.is_some() {
                    return Err(TrustError::Exceeds);
                }
            }
            Issuer::Credential(hash) => {
                let credential = presented
                    .credential
                    .as_ref()
                    .filter(|credential| credential.hash() == hash)
                    .ok_or(TrustError::IssuerUnknown)?;
                self.verify_credential(credential)?;
                let credential = credential.object();
                if presented.certificate.verify_by(&credential.invite_key).is_err() {
                    return Err(TrustError::Certificate);
                }
                if certificate.role != credential.role
                    || certificate.attrs != credential.attrs
                    || certificate.services != credential.services
                {
                    return Err(TrustError::Exceeds);
                }
                let tolerance = match credential.kind {
                    CredentialKind::Invite => CLOCK_TOLERANCE.as_secs(),
                    CredentialKind::Share => 0,
                };
                if now > credential.certs_end.saturating_add(tolerance) {
                    return Err(TrustError::Expired);
                }
            }
        }
        let ended = |end: UnixTime| now > end.saturating_add(CLOCK_TOLERANCE.as_secs());
        if certificate.not_after.is_some_and(ended) {
            return Err(TrustError::Expired);
        }
        Ok(VerifiedPeer { agent_id: expected, presented })
    }
}

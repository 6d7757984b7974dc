//! A small workspace whose every secret follows from a label, for tests and vectors.

#![allow(dead_code, unreachable_pub, reason = "no test binary uses all of it")]

use std::convert::Infallible;

use connect_crypto::{
    epoch::EpochSecrets,
    handshake::Local,
    invite::{HubAddress, Invite, InviteKeys, InviteSeed},
    keys::{RecoveryKey, SigningKey, StaticKeypair, WrapKeypair},
};
use connect_spec::{
    encoding::Encoding,
    hash::hash,
    ids::{AgentId, ChannelId, CredentialId, ServiceId, TunnelId, WorkspaceId},
    keys::IdentityKey,
    log::Head,
    objects::{
        AgentRecord, AgentRole, Attributes, Certificate, Credential, CredentialKind, Founder,
        Genesis, Issuer, NoiseKey, SUITE_1, ServiceRecord, SignerRole, UnixTime,
    },
    prologue::{Prologue, Realm},
    signed::Signed,
    trust::{Presented, TrustState},
};
use rand_core::{TryCryptoRng, TryRng};
use zeroize::Zeroizing;

pub mod log;

/// When the tests take place.
pub const NOW: UnixTime = 1_800_000_000;
pub const DAY: UnixTime = 24 * 3600;

/// Bytes that follow from a label.
pub fn bytes<const N: usize>(label: &str) -> [u8; N] {
    let mut out = [0; N];
    for (number, chunk) in (0u8..).zip(out.chunks_mut(32)) {
        let block = hash("test", &[label.as_bytes(), &[0, number]]);
        chunk.copy_from_slice(&block[..chunk.len()]);
    }
    out
}

pub fn secret<const N: usize>(label: &str) -> Zeroizing<[u8; N]> {
    Zeroizing::new(bytes(label))
}

/// Randomness that follows from a label, and remembers what it gave.
pub struct TestRng {
    label: String,
    pub draws: Vec<Vec<u8>>,
}

impl TestRng {
    pub fn new(label: &str) -> Self {
        Self { label: label.to_owned(), draws: Vec::new() }
    }
}

impl TryRng for TestRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut word = [0; 4];
        self.try_fill_bytes(&mut word)?;
        Ok(u32::from_be_bytes(word))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut word = [0; 8];
        self.try_fill_bytes(&mut word)?;
        Ok(u64::from_be_bytes(word))
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        let drawn: [u8; 256] = bytes(&format!("{} {}", self.label, self.draws.len()));
        out.copy_from_slice(&drawn[..out.len()]);
        self.draws.push(out.to_vec());
        Ok(())
    }
}

impl TryCryptoRng for TestRng {}

/// An agent with everything it holds.
pub struct Agent {
    pub identity: SigningKey,
    pub static_keypair: StaticKeypair,
    pub wrap: WrapKeypair,
    pub attrs: Attributes,
    pub presented: Presented,
}

impl Agent {
    pub fn id(&self) -> AgentId {
        self.presented.certificate.object().agent_id()
    }
}

/// An invite or a share with what its holder derives from it.
pub struct Admission {
    pub keys: InviteKeys,
    pub credential: Signed<Credential>,
    pub attrs: Attributes,
}

/// A workspace with one signer.
pub struct World {
    pub name: String,
    pub signer: SigningKey,
    pub recovery: RecoveryKey,
    pub epoch: EpochSecrets,
    pub genesis: Signed<Genesis>,
    pub workspace: WorkspaceId,
    pub trust: TrustState,
}

impl World {
    pub fn new() -> Self {
        Self::named("world")
    }

    pub fn named(name: &str) -> Self {
        let signer = SigningKey::from_seed(secret(&format!("{name} signer")));
        let recovery = RecoveryKey::generate(&mut TestRng::new(&format!("{name} recovery")));
        let epoch = EpochSecrets::from_bytes(secret(&format!("{name} epoch")));
        let genesis = signer.sign(&Genesis {
            suite: SUITE_1,
            salt: bytes(&format!("{name} salt")),
            founders: vec![Founder { key: signer.public(), role: SignerRole::Owner }],
            recovery_key: recovery.public(),
            epoch_commit: epoch.commit(),
        });
        let workspace = WorkspaceId(genesis.hash());
        let trust = TrustState::from_genesis(workspace, &genesis).expect("sound genesis");
        Self { name: name.to_owned(), signer, recovery, epoch, genesis, workspace, trust }
    }

    pub fn head(&self) -> Head {
        self.trust.head()
    }

    pub fn attrs(&self, name: &str) -> Attributes {
        let tags = vec!["prod".to_owned(), "eu-west".to_owned()];
        Attributes::new(bytes(&format!("{name} attrs")), tags).expect("sound tags")
    }

    pub fn certificate(&self, identity: &SigningKey, attrs: &Attributes) -> Certificate {
        Certificate {
            workspace_id: self.workspace,
            identity_key: identity.public(),
            role: AgentRole::Member,
            attrs: attrs.hash(),
            serial: 1,
            not_after: None,
            issuer: Issuer::Signer(self.signer.public()),
            services: None,
        }
    }

    pub fn noise_key(
        &self,
        identity: &IdentityKey,
        keys: &StaticKeypair,
        wrap: &WrapKeypair,
    ) -> NoiseKey {
        NoiseKey {
            workspace_id: self.workspace,
            agent_id: AgentId::of(&self.workspace, identity),
            suite: SUITE_1,
            counter: 1,
            static_key: keys.public(),
            wrap_key_hash: wrap.public().hash(),
        }
    }

    /// A member with a certificate by the signer.
    pub fn member(&self, name: &str) -> Agent {
        self.member_as(name, AgentRole::Member)
    }

    /// The same in another role.
    pub fn member_as(&self, name: &str, role: AgentRole) -> Agent {
        let identity = SigningKey::from_seed(secret(&format!("{name} identity")));
        let attrs = self.attrs(name);
        let certificate = Certificate { role, ..self.certificate(&identity, &attrs) };
        let certificate = self.signer.sign(&certificate);
        self.agent(name, identity, attrs, certificate, None)
    }

    pub fn agent(
        &self,
        name: &str,
        identity: SigningKey,
        attrs: Attributes,
        certificate: Signed<Certificate>,
        credential: Option<Signed<Credential>>,
    ) -> Agent {
        let static_keypair = StaticKeypair::from_secret(secret(&format!("{name} static")));
        let wrap = WrapKeypair::from_seed(secret(&format!("{name} wrap")));
        let noise_key = identity.sign(&self.noise_key(&identity.public(), &static_keypair, &wrap));
        let presented = Presented { certificate, credential, noise_key };
        Agent { identity, static_keypair, wrap, attrs, presented }
    }

    pub fn credential(
        &self,
        kind: CredentialKind,
        keys: &InviteKeys,
        attrs: &Attributes,
    ) -> Credential {
        let share = kind == CredentialKind::Share;
        Credential {
            workspace_id: self.workspace,
            kind,
            invite_key: keys.signing.public(),
            role: if share { AgentRole::Guest } else { AgentRole::Member },
            attrs: attrs.hash(),
            services: share.then(|| vec![ServiceId(bytes("service"))]),
            uses: 1,
            join_until: NOW + 3600,
            certs_end: NOW + 90 * DAY,
            issuer: self.signer.public(),
            wrap_key_hash: keys.wrap.public().hash(),
        }
    }

    pub fn admission(&self, name: &str, kind: CredentialKind) -> Admission {
        let seed = InviteSeed::from_bytes(secret(&format!("{name} seed")));
        let keys = InviteKeys::derive(&seed);
        let attrs = self.attrs(name);
        let credential = self.signer.sign(&self.credential(kind, &keys, &attrs));
        Admission { keys, credential, attrs }
    }

    /// The certificate that the holder of an admission signs for itself.
    pub fn joining(&self, admission: &Admission, identity: &SigningKey) -> Certificate {
        let credential = admission.credential.object();
        Certificate {
            role: credential.role,
            issuer: Issuer::Credential(admission.credential.hash()),
            services: credential.services.clone(),
            ..self.certificate(identity, &admission.attrs)
        }
    }

    /// An agent that joined by an admission.
    pub fn joined(&self, name: &str, admission: &Admission) -> Agent {
        let identity = SigningKey::from_seed(secret(&format!("{name} identity")));
        let certificate = admission.keys.signing.sign(&self.joining(admission, &identity));
        let credential = Some(admission.credential.clone());
        self.agent(name, identity, admission.attrs.clone(), certificate, credential)
    }

    pub fn local<'k>(&'k self, agent: &'k Agent) -> Local<'k> {
        Local {
            static_keypair: &agent.static_keypair,
            presented: &agent.presented,
            attrs: &agent.attrs,
            head: self.head(),
            realm_secret: &self.epoch.realm,
        }
    }

    pub fn prologue(&self, initiator: &Agent, responder: &Agent) -> Prologue {
        Prologue {
            workspace_id: self.workspace,
            tunnel_id: TunnelId(bytes("tunnel")),
            service_id: ServiceId(bytes("service")),
            initiator: initiator.id(),
            responder: responder.id(),
            share_id: CredentialId::NONE,
            channel_id: ChannelId(bytes("channel")),
            tunnel_no: 0,
            rekey: 0,
            previous_hash: [0; 32],
            realm: Realm::Member,
            encoding: Encoding::Base64,
        }
    }

    pub fn service_record(&self, agent: &Agent) -> ServiceRecord {
        ServiceRecord {
            workspace_id: self.workspace,
            service_id: ServiceId(bytes("service")),
            agent_id: agent.id(),
            counter: 7,
            epoch: 0,
            name: "prod-db".parse().expect("a name"),
            protocol: "postgres".to_owned(),
            certificate: agent.presented.certificate.clone(),
            credential: agent.presented.credential.clone(),
            noise_key: agent.presented.noise_key.clone(),
            port_hint: Some(5432),
            target_ok: Some(true),
        }
    }

    pub fn agent_record(&self, agent: &Agent) -> AgentRecord {
        AgentRecord {
            workspace_id: self.workspace,
            agent_id: agent.id(),
            counter: 3,
            epoch: 0,
            label: "web server".parse().expect("a label"),
            attrs: agent.attrs.clone(),
        }
    }

    pub fn invite(&self, hub: &str) -> Invite {
        let hub: HubAddress = hub.parse().expect("a hub address");
        let seed = InviteSeed::from_bytes(secret("invite seed"));
        let tags = Vec::new();
        Invite { hub, workspace_id: self.workspace, head: self.head(), seed, tags, share: None }
    }
}

//! One membership at work: the agent of a home, what it exposes, and the local ports of what it reaches.

use std::{collections::BTreeMap, sync::Arc};

use connect_spec::ids::ServiceName;
use tokio::sync::Mutex;

use crate::{
    agent::{Agent, Options},
    error::{Error, ErrorKind, Result},
    exposer::Exposed,
    forward::Forward,
    home::{Home, HomeLock, SavedExpose, SavedReach},
    host::{Keep, Reaching},
    local::{AgentStatus, ExposedStatus, ReachedStatus, ShareStatus, TrustStatus},
    naming,
    ports::{self, LocalEnd},
    target::Target,
};

/// An agent with its local ports. A member's exposes and reaches, a guest's only reaches.
#[derive(Debug)]
pub(crate) struct Membership {
    agent: Agent,
    forwards: Mutex<BTreeMap<ServiceName, Forward>>,
}

impl Membership {
    /// Starts the agent of a home and restores what it exposed and reached.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub(crate) async fn start(home: Home, lock: HomeLock, options: Options) -> Result<Self> {
        let agent = Agent::start(home, lock, options)?;
        let core = agent.core();
        let saved = core.state().clone();
        for expose in saved.exposes {
            match expose.target.parse() {
                Ok(target) => {
                    let allow = expose.allow.into_iter().collect();
                    let service = Exposed::new(expose.name, expose.service_id, target, allow);
                    core.exposer.add(Arc::new(service.speaking(expose.protocol)));
                }
                Err(error) => tracing::error!(service = %expose.name, %error, "not restored"),
            }
        }
        let membership = Self { forwards: Mutex::default(), agent };
        for SavedReach { name, port, address } in saved.reaches {
            let at = LocalEnd { port, address };
            if let Err(error) = membership.listen_for(&name, at, None).await {
                tracing::error!(service = %name, %error, "not restored");
            }
        }
        Ok(membership)
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Whether a service is reached here, or was: its name stands for an agent of this workspace then.
    pub(crate) async fn knows(&self, name: &ServiceName) -> bool {
        self.forwards.lock().await.contains_key(name) || self.agent.core().pinned(name).is_some()
    }

    /// Stops the agent.
    pub(crate) async fn stop(&self) {
        self.forwards.lock().await.clear();
        self.agent.stop().await;
    }

    /// Exposes a service and waits until the hub knows it. Without a name it gets one that says what it is,
    /// or keeps the one that it got so before.
    ///
    /// # Errors
    /// As [`Agent::expose`]; a target that cannot be parsed.
    pub(crate) async fn expose(
        &self,
        name: Option<ServiceName>,
        target: &str,
        allow: Vec<String>,
        take_over: bool,
        keep: Keep,
    ) -> Result<ExposedStatus> {
        let target: Target = target.parse()?;
        if let Some(name) = name {
            return self.expose_as(name, &target, None, allow, take_over, keep).await;
        }
        let services = self.agent.core().exposer.all();
        let before = naming::exposed_before(services.iter().map(AsRef::as_ref), &target);
        let protocol = naming::protocol_of(&target).await;
        if let Some(before) = before {
            // A target that is down says nothing new.
            let known = if protocol == "tcp" { before.protocol() } else { &protocol };
            let (name, known) = (before.name.clone(), Some(known.to_owned()));
            return self.expose_as(name, &target, known, allow, take_over, keep).await;
        }
        for name in naming::candidates(&target, &protocol) {
            if !self.agent.is_free(&name).await? {
                continue;
            }
            let (known, allow) = (Some(protocol.clone()), allow.clone());
            match self.expose_as(name.clone(), &target, known, allow, take_over, keep).await {
                // Somebody else was faster.
                Err(error)
                    if error.kind == ErrorKind::Refused && !self.agent.is_free(&name).await? => {}
                settled => return settled,
            }
        }
        Err(naming::none_free(&target, &protocol))
    }

    async fn expose_as(
        &self,
        name: ServiceName,
        target: &Target,
        protocol: Option<String>,
        allow: Vec<String>,
        take_over: bool,
        keep: Keep,
    ) -> Result<ExposedStatus> {
        let core = self.agent.core();
        // A service that is exposed again is the same service: its id stays.
        let running = core.exposer.all().into_iter().find(|service| service.name == name);
        let service_id =
            running.map_or_else(|| self.agent.service_id(&name), |service| service.service_id);
        let service =
            Exposed::new(name.clone(), service_id, target.clone(), allow.iter().cloned().collect())
                .speaking(protocol.clone());
        if keep == Keep::ThisRun {
            // Should this process be killed, the next one tells the hub. Not before the login, which
            // tells of everything that is noted and not exposed.
            self.agent.connected().await?;
            core.note_withdrawn(service_id)?;
        }
        self.agent.expose(service, take_over).await?;
        if keep == Keep::Saved {
            let mut state = core.state();
            state.withdrawn.retain(|withdrawn| *withdrawn != service_id);
            state.exposes.retain(|saved| saved.name != name);
            let target = target.to_string();
            let name = name.clone();
            state.exposes.push(SavedExpose { name, target, service_id, allow, protocol });
            core.home.save_state(&state)?;
        }
        self.exposed()
            .into_iter()
            .find(|exposed| exposed.name == name)
            .ok_or_else(|| Error::new(ErrorKind::Other, "the service was withdrawn meanwhile"))
    }

    /// Withdraws a service, now and for the next start.
    ///
    /// # Errors
    /// As [`Agent::unexpose`].
    pub(crate) async fn unexpose(&self, name: &ServiceName) -> Result<()> {
        let core = self.agent.core();
        let mut withdrawn = self.agent.unexpose(name).await;
        let mut state = core.state();
        let before = state.exposes.len();
        state.exposes.retain(|saved| saved.name != *name);
        if state.exposes.len() < before {
            core.home.save_state(&state)?;
            // The hub hears of it at the next login at the latest.
            if withdrawn.as_ref().is_err_and(|error| error.kind == ErrorKind::ServiceNotFound) {
                withdrawn = Ok(());
            }
        }
        withdrawn
    }

    /// Reaches a service on a local port and waits for its exposer.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`] and [`ErrorKind::TrustViolation`], and nothing is kept;
    /// [`ErrorKind::ExposerOffline`], and the port is bound and further tries are made.
    pub(crate) async fn reach(&self, reaching: &Reaching, keep: Keep) -> Result<ReachedStatus> {
        let Reaching { name, at, accept_new, .. } = reaching.clone();
        if accept_new {
            // Begun anew: what is running may have given up on the other agent.
            self.forwards.lock().await.remove(&name);
            self.agent.unreach(&name);
            self.agent.core().unpin(&name);
        }
        let found = self.agent.find(&name).await?;
        // The port of a target that is down may be free because the exposer is on this very machine: taken
        // here, the exposer would dial this agent, and so on without end.
        let down = found.record.target_ok == Some(false);
        let own = found.record.port_hint.filter(|_| !down);
        let is_new = self.listen_for(&name, at, own).await?;
        let ready = self.reached(&name).await.ok_or_else(gone)?.ready().await;
        if let Err(error) = &ready
            && is_new
            && matches!(
                error.kind,
                ErrorKind::TrustViolation | ErrorKind::Refused | ErrorKind::ServiceNotFound
            )
        {
            self.forwards.lock().await.remove(&name);
            self.agent.unreach(&name);
            return Err(error.clone());
        }
        if keep == Keep::Saved {
            let core = self.agent.core();
            let mut state = core.state();
            // Reaching it once more takes no pinned port back.
            let is_saved = state.reaches.iter().any(|saved| saved.name == name);
            if !is_saved || at != LocalEnd::default() {
                let LocalEnd { port, address } = at;
                state.reaches.retain(|saved| saved.name != name);
                state.reaches.push(SavedReach { name: name.clone(), port, address });
                core.home.save_state(&state)?;
            }
        }
        ready?;
        let mut all = self.all_reached().await.into_iter();
        let reached = all.find(|reached| reached.name == name).ok_or_else(gone)?;
        Ok(ReachedStatus { protocol: Some(found.record.protocol), ..reached })
    }

    async fn reached(&self, name: &ServiceName) -> Option<crate::Reached> {
        self.forwards.lock().await.get(name).map(|forward| forward.reached.clone())
    }

    /// Binds the port of a service and begins to reach it; false for one that is reached so already.
    async fn listen_for(&self, name: &ServiceName, at: LocalEnd, own: Option<u16>) -> Result<bool> {
        let mut forwards = self.forwards.lock().await;
        if let Some(forward) = forwards.get(name)
            && at.is(forward.address)
        {
            return Ok(false);
        }
        let bound = ports::bind(&self.agent.core().home, name, at, own).await?;
        if let Some(reason) = &bound.passed_over {
            tracing::info!(service = %name, "it is not on {reason}");
        }
        let forward = Forward::start(bound, self.agent.reach(name))?;
        forwards.insert(name.clone(), forward);
        Ok(true)
    }

    /// Reaches a service no longer, now and at the next start.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`] when it is not reached.
    pub(crate) async fn unreach(&self, name: &ServiceName) -> Result<()> {
        let removed = self.forwards.lock().await.remove(name);
        self.agent.unreach(name);
        let core = self.agent.core();
        let mut state = core.state();
        let before = state.reaches.len();
        state.reaches.retain(|saved| saved.name != *name);
        if state.reaches.len() < before {
            core.home.save_state(&state)?;
        } else if removed.is_none() {
            return Err(Error::new(
                ErrorKind::ServiceNotFound,
                format_args!("this agent does not reach `{name}`"),
            )
            .hint("`connect status` lists what it reaches"));
        }
        Ok(())
    }

    fn exposed(&self) -> Vec<ExposedStatus> {
        let exposed = self.agent.core().exposer.status().into_iter();
        exposed
            .map(|(service, streams)| ExposedStatus {
                name: service.name.clone(),
                target: service.target.to_string(),
                service_id: service.service_id,
                streams,
                target_ok: service.target_ok(),
            })
            .collect()
    }

    async fn all_reached(&self) -> Vec<ReachedStatus> {
        let forwards = self.forwards.lock().await;
        let reached = forwards.iter().map(|(name, forward)| {
            let status = forward.reached.status();
            ReachedStatus {
                name: name.clone(),
                address: forward.address.to_string(),
                protocol: None,
                active: status.active,
                rtt_ms: status.round_trip.map(|time| time.as_secs_f64() * 1000.0),
                streams: status.streams,
                passed_over: forward.passed_over.clone(),
                rekeys: status.rekeys,
                error: status.error,
            }
        });
        reached.collect()
    }

    /// How the agent is doing.
    pub(crate) async fn status(&self) -> AgentStatus {
        let identity = self.agent.core().identity();
        let head = identity.trust.head();
        AgentStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            agent_id: identity.agent_id,
            label: identity.label.clone(),
            workspace_id: identity.workspace_id(),
            hub: identity.hub.to_string(),
            connected: self.agent.is_connected(),
            error: self.agent.not_connected(),
            trust: TrustStatus {
                seq: head.seq,
                head: head.hash.to_string(),
                beat_age_s: self.agent.core().beat_age(None).map(|age| age.as_secs()),
                frozen: identity.trust.is_frozen(),
                forked: identity.trust.is_forked(),
                strict: identity.trust.policy().strict,
                epoch: identity.epochs.current().number,
            },
            exposed: self.exposed(),
            reached: self.all_reached().await,
            share: identity.share_id().map(|id| ShareStatus {
                id,
                label: identity.share_label.clone(),
                expires: identity.share_end(),
            }),
            shares: Vec::new(),
        }
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Other, "the service was let go of meanwhile")
}

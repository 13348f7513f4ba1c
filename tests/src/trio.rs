//! The three pods that most tests of the capture need.

use anyhow::Result;
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::config::Mesh;
use crate::lab::Lab;
use crate::pod::Pod;

/// Pods without agents yet: `web` on node-a and `api` on node-b, which shall be enrolled, and `out` on node-a, which is not.
#[derive(Debug)]
pub struct Trio {
    /// 10.9.0.10, enrolled; no policy, so PERMISSIVE.
    pub web: Pod,
    /// 10.9.1.11, enrolled, with a policy of its own.
    pub api: Pod,
    /// 10.9.0.12, never enrolled.
    pub out: Pod,
    /// What the agents shall know.
    pub mesh: Mesh,
    /// The nodes.
    pub lab: Lab,
}

impl Trio {
    /// `listener`: the `listener` of api's policy, as in `{"mode": "STRICT"}`.
    pub fn new(name: &str, listener: Value) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (web, api, out) = (lab.a.pod("web", 10)?, lab.b.pod("api", 11)?, lab.a.pod("out", 12)?);
        let mut mesh = Mesh::new(&lab);
        mesh.enrol(&web);
        mesh.enrol(&api);
        mesh.policy("api", json!({ "listener": listener }));
        Ok(Self { web, api, out, mesh, lab })
    }

    /// The same with a STRICT `api`.
    pub fn strict(name: &str) -> Result<Self> {
        Self::new(name, json!({ "mode": "STRICT" }))
    }

    /// Starts both agents and waits until they serve `web` and `api`.
    pub fn start(&self) -> Result<(Agent, Agent)> {
        self.mesh.start()
    }
}

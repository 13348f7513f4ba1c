//! What peers that are not Sealane, or not whom they should be, meet at an agent, and what agents say of it.

mod clients;
mod modes;
mod servers;

use std::time::Duration;

use anyhow::{Result, ensure};
use sealane_tests::agent::Agent;
use sealane_tests::ca::{Ca, Flaw, Svid};
use sealane_tests::config::{Config, TRUST_DOMAIN};
use sealane_tests::files::Files;
use sealane_tests::report::{End, Event, Outcome};
use sealane_tests::testpod::Server;
use sealane_tests::trio::Trio;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

/// What must reach neither an application nor the wire in the clear.
const MARKER: &str = "a-marker-that-must-not-be-seen";

/// Sends it and reads the answer to its end.
const SEND: [&str; 3] = ["--text", MARKER, "--half-close"];

/// `web` and `api` with sound SVIDs of files.
struct Scene {
    trio: Trio,
    files: Files,
}

impl Scene {
    fn new(name: &str, listener: Value) -> Result<Self> {
        let trio = Trio::new(name, listener)?;
        let files = Files::new(&trio.lab)?;
        files.give_sound(&["web", "api"])?;
        Ok(Self { trio, files })
    }

    /// Both agents.
    fn start(&self) -> Result<(Agent, Agent)> {
        self.trio.mesh.start_with(|config| self.edit(config))
    }

    /// The files; time enough for a handshake on a machine that is busy; and a PERMISSIVE port waits for the first byte
    /// longer than any client here takes, so that the application hears of none that is refused.
    fn edit(&self, config: &mut Config) {
        self.files.feed(config);
        config.timeouts.extend([("handshake".into(), "30s".into()), ("peek".into(), "10s".into())]);
    }

    /// The same with little time for a handshake.
    fn hasten(&self, config: &mut Config) {
        self.edit(config);
        config.timeouts.insert("handshake".into(), "1s".into());
    }

    /// Certificates for `path` which nobody may accept, each with the reason of the side that refuses it and the alert
    /// that the other side gets.
    fn bad_svids(&self, path: &str) -> Result<Vec<(Svid, &'static str, &'static str)>> {
        let mut bad = Vec::new();
        for flaw in Flaw::ALL {
            let (reason, alert) = refusal(flaw);
            bad.push((self.files.ca.flawed(path, flaw)?, reason, alert));
        }
        let (stranger, impostor) = (Ca::new("other.example")?, Ca::new(TRUST_DOMAIN)?);
        bad.push((stranger.svid(path)?, "trust_domain_unknown", "certificate_unknown"));
        bad.push((impostor.svid(path)?, "certificate_untrusted", "unknown_ca"));
        Ok(bad)
    }
}

fn refusal(flaw: Flaw) -> (&'static str, &'static str) {
    match flaw {
        Flaw::Expired => ("certificate_expired", "certificate_expired"),
        Flaw::NotYetValid => ("certificate_not_yet_valid", "certificate_expired"),
        Flaw::NoId => ("spiffe_id_missing", "certificate_unknown"),
        Flaw::TwoIds => ("spiffe_id_ambiguous", "certificate_unknown"),
        Flaw::IdWithoutPath => ("spiffe_id_malformed", "certificate_unknown"),
        Flaw::IsCa | Flaw::SignsCertificates => ("certificate_is_ca", "certificate_unknown"),
        Flaw::KeyUsage => ("certificate_key_usage", "certificate_unknown"),
        Flaw::ServerOnly | Flaw::ClientOnly => ("certificate_extended_usage", "unsupported_certificate"),
        Flaw::SelfSigned => ("certificate_untrusted", "unknown_ca"),
    }
}

/// How many connections the application has accepted.
fn accepted(server: &Server) -> usize {
    server.events().iter().filter(|event| matches!(event, Event::Accepted { .. })).count()
}

/// The client saw a reset and not one byte.
fn reset(outcome: &Outcome) -> Result<()> {
    // Whichever of its writer and its reader came first has the error; the other sees an end.
    let reset = outcome.end == End::Reset || outcome.error.as_deref() == Some("ECONNRESET");
    ensure!(outcome.received == 0 && reset, "{outcome:?}");
    Ok(())
}

/// rustls' name of an alert.
fn camel(alert: &str) -> String {
    let word = |word: &str| if word == "ca" { "CA".to_owned() } else { word[..1].to_uppercase() + &word[1..] };
    alert.split('_').map(word).collect()
}

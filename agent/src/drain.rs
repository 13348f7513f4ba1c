//! Ending a pod's service in two steps: stop accepting, then close what is still open. Done when every watcher is gone.

use sealane_common::reason::Reason;
use tokio::sync::watch;

/// A trigger and the watcher that every listener and connection holds a clone of.
pub fn channel() -> (Trigger, Watcher) {
    let (sender, receiver) = watch::channel(Phase::Serving);
    (Trigger(sender), Watcher(receiver))
}

/// Ends what watches. Dropped without [`Self::close`], it closes everything with [`Reason::Aborted`].
#[derive(Debug)]
#[must_use = "a dropped trigger closes every connection"]
pub struct Trigger(watch::Sender<Phase>);

/// Sees the trigger; its existence is what [`Trigger::drained`] waits for.
#[derive(Clone, Debug)]
pub struct Watcher(watch::Receiver<Phase>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    Draining,
    Closed(Reason),
}

impl Trigger {
    /// Listeners close; open connections go on.
    pub fn stop_accepting(&self) {
        self.advance(Phase::Draining);
    }

    /// Listeners close and every open connection is reset with this reason; the first reason stays.
    pub fn close(&self, reason: Reason) {
        self.advance(Phase::Closed(reason));
    }

    /// Returns when no watcher is left: every listener is closed and every connection has ended.
    pub async fn drained(&self) {
        self.0.closed().await;
    }

    fn advance(&self, to: Phase) {
        self.0.send_if_modified(|phase| {
            let forward = matches!((*phase, to), (Phase::Serving, _) | (Phase::Draining, Phase::Closed(_)));
            if forward {
                *phase = to;
            }
            forward
        });
    }
}

impl Watcher {
    /// Returns when no connection shall be accepted any more.
    pub async fn stopped(&mut self) {
        // An error is a dropped trigger, which stops as well.
        let _ = self.0.wait_for(|phase| *phase != Phase::Serving).await;
    }

    /// Returns when open connections shall end, and why.
    pub async fn closed(&mut self) -> Reason {
        match self.0.wait_for(|phase| matches!(phase, Phase::Closed(_))).await.as_deref() {
            Ok(Phase::Closed(reason)) => *reason,
            Ok(Phase::Serving | Phase::Draining) | Err(_) => Reason::Aborted,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn stops_then_closes_with_the_first_reason_then_is_drained() {
        let (trigger, mut watcher) = channel();
        assert!(watcher.stopped().now_or_never().is_none());
        trigger.stop_accepting();
        watcher.stopped().await;
        assert!(watcher.closed().now_or_never().is_none());
        trigger.close(Reason::Unenrolled);
        trigger.close(Reason::Draining);
        trigger.stop_accepting();
        assert_eq!(watcher.closed().await, Reason::Unenrolled);
        assert!(trigger.drained().now_or_never().is_none());
        drop(watcher);
        trigger.drained().await;
    }

    #[tokio::test]
    async fn a_dropped_trigger_closes() {
        let (trigger, mut watcher) = channel();
        drop(trigger);
        watcher.stopped().await;
        assert_eq!(watcher.closed().await, Reason::Aborted);
    }
}

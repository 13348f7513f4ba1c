//! Per-CPU counters of what the programs decided.

use sealane_common::reason::Reason;

use crate::maps::EVENTS;

/// Adds one.
#[inline(always)]
pub fn add(reason: Reason) {
    if let Some(count) = EVENTS.get_ptr_mut(reason as u32) {
        // SAFETY: the slot belongs to this CPU, and the pointer was checked; a lost increment under preemption is harmless.
        unsafe { *count += 1 };
    }
}

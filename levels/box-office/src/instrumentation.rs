//! Who watches the steps of a server: the recorder of its trace, and the stop that a test asked for.

use std::sync::Arc;

use crate::{Steps, breakpoint::Breakpoint, trace::Recorder};

/// Hands out the scheduling points of requests, and of whatever else runs in a server. Nobody watches unless the settings say so.
#[derive(Clone, Default)]
pub struct Instrumentation {
    pub(crate) recorder: Option<Arc<Recorder>>,
    pub(crate) breakpoint: Option<Arc<Breakpoint>>,
}

impl Instrumentation {
    /// The scheduling points of whoever has this name in the trace.
    pub fn steps(&self, name: &str) -> Steps {
        let steps = match &self.recorder {
            None => Steps::unobserved(),
            Some(recorder) => recorder.steps_of(name.into()),
        };
        match &self.breakpoint {
            None => steps,
            Some(breakpoint) => breakpoint.watch(steps),
        }
    }
}

//! Streams, captures, graphs and events.

use crate::driver::code::Code;
use crate::driver::context::{Event, Handle, Recorded, Stream, current};
use crate::driver::graph::{Graph, Mode};
use crate::driver::stream::{Worker, lock};
use crate::driver::{Out, call};
use std::ffi::{c_uint, c_ulonglong};
use std::sync::{Arc, Mutex};

/// The flags of `cuStreamCreate`: the stream does not synchronize with the null stream.
const NON_BLOCKING: c_uint = 1;
/// The flag of `cuEventCreate` for events without a time, and all flags.
const DISABLE_TIMING: c_uint = 2;
const EVENT_FLAGS: c_uint = 7;
/// All flags of `cuGraphInstantiateWithFlags`.
const GRAPH_FLAGS: c_ulonglong = 15;

/// A stream that synchronizes with the null stream shares its queue, which keeps all their work in order.
#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: Out<Handle>, flags: c_uint) -> Code {
    call(|| {
        let context = current()?;
        let to = stream.ok_or(Code::InvalidValue)?;
        let shared = match flags {
            0 => true,
            NON_BLOCKING => false,
            _ => return Err(Code::InvalidValue),
        };
        let worker = if shared { context.stream(0)?.worker.clone() } else { Worker::start(&context)? };
        to.write(context.streams.insert(Stream { worker, shared, capture: Mutex::default() }));
        Ok(())
    })
}

/// Work that is in the stream is still done.
#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> Code {
    call(|| {
        let stream = current()?.streams.remove(stream, Code::InvalidHandle)?;
        if !stream.shared {
            stream.worker.close();
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> Code {
    call(|| {
        let context = current()?;
        let stream = context.stream(stream)?;
        stream.forbid_capture()?;
        stream.worker.finish();
        context.check()
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) -> Code {
    call(|| {
        let context = current()?;
        let mode = match mode {
            0 => Mode::Global,
            1 => Mode::ThreadLocal,
            2 => Mode::Relaxed,
            _ => return Err(Code::InvalidValue),
        };
        if stream <= 1 {
            return Err(Code::CaptureUnsupported);
        }
        context.stream(stream)?.begin_capture(mode)
    })
}

/// Writes a null graph if the capture failed.
#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: Handle, graph: Out<Handle>) -> Code {
    call(|| {
        let context = current()?;
        let to = graph.ok_or(Code::InvalidValue)?;
        to.write(0);
        let graph = context.stream(stream)?.end_capture()?;
        to.write(context.graphs.insert(graph));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(
    executable: Out<Handle>,
    graph: Handle,
    flags: c_ulonglong,
) -> Code {
    call(|| {
        let context = current()?;
        let to = executable.ok_or(Code::InvalidValue)?;
        if flags & !GRAPH_FLAGS != 0 {
            return Err(Code::InvalidValue);
        }
        let graph = context.graphs.get(graph, Code::InvalidValue)?;
        graph.check_modules()?;
        to.write(context.executables.insert(Graph { nodes: graph.nodes.clone() }));
        Ok(())
    })
}

fn executable(executable: Handle, stream: Handle) -> Result<(Arc<Graph>, Arc<Stream>), Code> {
    let context = current()?;
    let executable = context.executables.get(executable, Code::InvalidValue)?;
    let stream = context.stream(stream)?;
    executable.check_modules()?;
    Ok((executable, stream))
}

/// There is nothing to upload, but the call fails where it would.
#[unsafe(no_mangle)]
extern "C" fn cuGraphUpload(graph: Handle, stream: Handle) -> Code {
    call(|| executable(graph, stream)?.1.forbid_capture())
}

/// Launched into a capture, the graph's nodes become part of the new graph.
#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(graph: Handle, stream: Handle) -> Code {
    call(|| {
        let (graph, stream) = executable(graph, stream)?;
        stream.enqueue(graph.nodes.iter().cloned())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: Handle) -> Code {
    call(|| current()?.graphs.remove(graph, Code::InvalidValue).map(|_| ()))
}

/// A launch of the graph that is under way is still done.
#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(graph: Handle) -> Code {
    call(|| current()?.executables.remove(graph, Code::InvalidValue).map(|_| ()))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: Out<Handle>, flags: c_uint) -> Code {
    call(|| {
        let context = current()?;
        if flags & !EVENT_FLAGS != 0 {
            return Err(Code::InvalidValue);
        }
        let to = event.ok_or(Code::InvalidValue)?;
        let recorded = Mutex::new(Recorded::Never);
        to.write(context.events.insert(Event { timed: flags & DISABLE_TIMING == 0, recorded }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> Code {
    call(|| current()?.events.remove(event, Code::InvalidHandle).map(|_| ()))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> Code {
    call(|| {
        let context = current()?;
        let event = context.events.get(event, Code::InvalidHandle)?;
        let stream = context.stream(stream)?;
        stream.enqueue([])?;
        let worker = stream.worker.clone();
        *lock(&event.recorded) = match stream.is_capturing() {
            true => Recorded::InCapture,
            false => Recorded::After { steps: worker.submitted(), worker },
        };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> Code {
    call(|| {
        let context = current()?;
        let recorded = lock(&context.events.get(event, Code::InvalidHandle)?.recorded).clone();
        match recorded {
            Recorded::Never => Ok(()),
            Recorded::InCapture => Err(Code::CapturedEvent),
            Recorded::After { worker, steps } => {
                worker.wait(steps);
                context.check()
            }
        }
    })
}

/// The time is 0: how long a kernel takes here says nothing about a GPU.
#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) -> Code {
    call(|| {
        let context = current()?;
        let to = milliseconds.ok_or(Code::InvalidValue)?;
        let events = [start, end].map(|event| context.events.get(event, Code::InvalidHandle));
        for event in events {
            let event = event?;
            match &*lock(&event.recorded) {
                _ if !event.timed => return Err(Code::InvalidHandle),
                Recorded::Never => return Err(Code::InvalidHandle),
                Recorded::InCapture => return Err(Code::CapturedEvent),
                Recorded::After { worker, steps } if !worker.is_done(*steps) => return Err(Code::NotReady),
                Recorded::After { .. } => {}
            }
        }
        to.write(0.0);
        Ok(())
    })
}

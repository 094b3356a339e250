// The only pybind11 file: integers in, AttentionParams out.
//
// A tensor is a tuple (pointer, stride, stride, stride, stride), None where there is none; what is the same for all
// calls of one spec is one flat tuple, packed once by fastattn/backends/native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/attention.h"
#include "params.h"
#ifdef FASTATTN_WITH_CUDA
#include "cuda/attention.h"
#endif

namespace py = pybind11;

namespace fastattn {
namespace {

// Reads a tuple from front to back.
class TupleReader {
public:
    TupleReader(const py::tuple& tuple, Py_ssize_t expected_size) : tuple_(tuple.ptr()) {
        check(PyTuple_GET_SIZE(tuple_) == expected_size, "expected a tuple of ", expected_size, " numbers, got ",
              PyTuple_GET_SIZE(tuple_));
    }
    int64_t integer() {
        const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple_, next_++));
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    double real() {
        const double value = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple_, next_++));
        if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    void* pointer() {
        void* value = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple_, next_++));
        if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    template <typename T>
    void table(Table<T>& result) {
        result.data = static_cast<const T*>(pointer());
        for (int64_t& stride : result.stride) stride = integer();
    }

private:
    PyObject* tuple_;
    Py_ssize_t next_ = 0;
};

Tensor4 tensor(const py::object& packed) {
    if (packed.is_none()) return Tensor4{};
    if (!PyTuple_Check(packed.ptr())) throw py::type_error("a tensor must be None or a tuple (pointer, *strides)");
    TupleReader reader(py::reinterpret_borrow<py::tuple>(packed), 5);
    Tensor4 result{};
    result.data = reader.pointer();
    for (int64_t& stride : result.stride) stride = reader.integer();
    return result;
}

void read_tables(AttentionParams& p, const py::object& packed) {
    if (!PyTuple_Check(packed.ptr())) throw py::type_error("tables must be None or a tuple of numbers");
    TupleReader reader(py::reinterpret_borrow<py::tuple>(packed), 39);
    reader.table(p.alibi_slopes);
    reader.table(p.sinks);
    reader.table(p.q_segments);
    reader.table(p.k_segments);
    reader.table(p.prefix_lens);
    reader.table(p.cu_seqlens_q);
    reader.table(p.cu_seqlens_k);
    reader.table(p.seqused_k);
    reader.table(p.leftpad_k);
    reader.table(p.block_table);
    reader.table(p.q_descale);
    reader.table(p.k_descale);
    reader.table(p.v_descale);
}

AttentionParams forward_params(const py::tuple& call, uintptr_t dropout_seed, const py::object& q, const py::object& k,
                               const py::object& v, const py::object& mask, const py::object& bias,
                               const py::object& tables, const py::object& out, const py::object& lse) {
    AttentionParams p{};
    TupleReader reader(call, 26);
    p.dtype = static_cast<DType>(reader.integer());
    p.bias_dtype = static_cast<DType>(reader.integer());
    p.batch = reader.integer();
    p.heads_q = reader.integer();
    p.heads_k = reader.integer();
    p.seqlen_q = reader.integer();
    p.seqlen_k = reader.integer();
    p.head_dim_qk = reader.integer();
    p.head_dim_v = reader.integer();
    p.softmax_scale = reader.real();
    p.left = reader.integer();
    p.right = reader.integer();
    p.offset = reader.integer();
    p.dropout_threshold = static_cast<uint64_t>(reader.integer());
    p.dropout_scale = reader.real();
    for (int64_t& size : p.bias_shape) size = reader.integer();
    p.softcap = reader.real();
    p.relative_offset = reader.integer() != 0;
    p.total_q = reader.integer();
    p.total_k = reader.integer();
    p.page_size = reader.integer();
    p.num_pages = reader.integer();
    p.num_splits = reader.integer();
    p.dropout_seed = reinterpret_cast<const int64_t*>(dropout_seed);
    check(p.dropout_threshold == 0 || p.dropout_seed != nullptr, "dropout without a seed");
    p.q = tensor(q);
    p.k = tensor(k);
    p.v = tensor(v);
    p.mask = tensor(mask);
    p.bias = tensor(bias);
    if (!tables.is_none()) read_tables(p, tables);
    p.out = tensor(out);
    p.lse = tensor(lse);
    return p;
}

AttentionParams backward_params(AttentionParams p, const py::object& grad_out, const py::object& grad_lse,
                                const py::object& dq, const py::object& dk, const py::object& dv,
                                const py::object& dbias) {
    p.grad_out = tensor(grad_out);
    p.grad_lse = tensor(grad_lse);
    p.dq = tensor(dq);
    p.dk = tensor(dk);
    p.dv = tensor(dv);
    p.dbias = tensor(dbias);
    return p;
}

void cpu_forward(const py::tuple& call, uintptr_t dropout_seed, const py::object& q, const py::object& k,
                 const py::object& v, const py::object& mask, const py::object& bias, const py::object& tables,
                 const py::object& out, const py::object& lse, int64_t num_threads) {
    AttentionParams p = forward_params(call, dropout_seed, q, k, v, mask, bias, tables, out, lse);
    p.num_threads = num_threads;
    py::gil_scoped_release release;
    cpu::attention_forward(p);
}

void cpu_backward(const py::tuple& call, uintptr_t dropout_seed, const py::object& q, const py::object& k,
                  const py::object& v, const py::object& mask, const py::object& bias, const py::object& tables,
                  const py::object& out, const py::object& lse, const py::object& grad_out, const py::object& grad_lse,
                  const py::object& dq, const py::object& dk, const py::object& dv, const py::object& dbias,
                  int64_t num_threads) {
    AttentionParams p = backward_params(forward_params(call, dropout_seed, q, k, v, mask, bias, tables, out, lse),
                                        grad_out, grad_lse, dq, dk, dv, dbias);
    p.num_threads = num_threads;
    py::gil_scoped_release release;
    cpu::attention_backward(p);
}

#ifdef FASTATTN_WITH_CUDA
// What is known of a call without its tensors.
AttentionParams cuda_call_params(const py::tuple& call, bool has_mask, bool has_bias, bool deterministic,
                                 int64_t device) {
    const py::object none = py::none(), some = py::make_tuple(1, 0, 0, 0, 0);
    AttentionParams p =
        forward_params(call, 1, none, none, none, has_mask ? some : none, has_bias ? some : none, none, none, none);
    p.deterministic = deterministic;
    p.device = device;
    return p;
}

// present: the tensors that the call has beside q, k and v, by the names of AttentionSpec.features().
std::string cuda_configuration(const py::tuple& call, const std::vector<std::string>& present, bool backward) {
    const auto has = [&](const char* name) { return std::find(present.begin(), present.end(), name) != present.end(); };
    AttentionParams p = cuda_call_params(call, has("mask"), has("bias"), false, 0);
    const auto mark = [&](auto& table, const char* name) {
        if (has(name)) table.data = reinterpret_cast<decltype(table.data)>(uintptr_t{1});  // which is not read
    };
    mark(p.alibi_slopes, "alibi_slopes");
    mark(p.sinks, "sinks");
    mark(p.q_segments, "segments");
    mark(p.prefix_lens, "prefix_lens");
    mark(p.seqused_k, "seqused_k");
    mark(p.leftpad_k, "leftpad_k");
    mark(p.block_table, "paged keys");
    return cuda::configuration(p, backward);
}

std::string cuda_e4m3_reason(const py::tuple& call, int64_t device) {
    return cuda::e4m3_reason(cuda_call_params(call, false, false, false, device));
}

size_t cuda_forward_workspace_bytes(const py::tuple& call, int64_t device) {
    return cuda::forward_workspace_bytes(cuda_call_params(call, false, false, false, device));
}

size_t cuda_backward_workspace_bytes(const py::tuple& call, bool deterministic) {
    return cuda::backward_workspace_bytes(cuda_call_params(call, false, false, deterministic, 0));
}

void cuda_forward(const py::tuple& call, uintptr_t dropout_seed, const py::object& q, const py::object& k,
                  const py::object& v, const py::object& mask, const py::object& bias, const py::object& tables,
                  const py::object& out, const py::object& lse, uintptr_t workspace, int64_t device, uintptr_t stream) {
    AttentionParams p = forward_params(call, dropout_seed, q, k, v, mask, bias, tables, out, lse);
    p.workspace = reinterpret_cast<void*>(workspace);
    p.device = device;
    py::gil_scoped_release release;
    cuda::attention_forward(p, reinterpret_cast<void*>(stream));
}

void cuda_backward(const py::tuple& call, uintptr_t dropout_seed, const py::object& q, const py::object& k,
                   const py::object& v, const py::object& mask, const py::object& bias, const py::object& tables,
                   const py::object& out, const py::object& lse, const py::object& grad_out, const py::object& grad_lse,
                   const py::object& dq, const py::object& dk, const py::object& dv, const py::object& dbias,
                   uintptr_t workspace, bool deterministic, int64_t device, uintptr_t stream) {
    AttentionParams p = backward_params(forward_params(call, dropout_seed, q, k, v, mask, bias, tables, out, lse),
                                        grad_out, grad_lse, dq, dk, dv, dbias);
    p.workspace = reinterpret_cast<void*>(workspace);
    p.deterministic = deterministic;
    p.device = device;
    py::gil_scoped_release release;
    cuda::attention_backward(p, reinterpret_cast<void*>(stream));
}
#endif

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
    using namespace fastattn;
    m.doc() = "Compiled kernels of fastattn; see csrc/params.h for what a call is made of.";
    m.def("cpu_forward", &cpu_forward);
    m.def("cpu_backward", &cpu_backward);
    m.def("cpu_leave_openmp", &cpu::leave_openmp);
    m.def("cpu_instruction_set", &cpu::instruction_set);
    m.def("cpu_instruction_sets", &cpu::instruction_sets);
#ifdef FASTATTN_WITH_CUDA
    m.attr("has_cuda") = true;
    m.def("cuda_configuration", &cuda_configuration);
    m.def("cuda_e4m3_reason", &cuda_e4m3_reason);
    m.def("cuda_forward_workspace_bytes", &cuda_forward_workspace_bytes);
    m.def("cuda_backward_workspace_bytes", &cuda_backward_workspace_bytes);
    m.def("cuda_forward", &cuda_forward);
    m.def("cuda_backward", &cuda_backward);
    m.attr("cuda_archs") = FASTATTN_CUDA_ARCHS;
#else
    m.attr("has_cuda") = false;
    m.attr("cuda_archs") = "";
#endif
}
